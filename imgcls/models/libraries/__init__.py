"""Libraries of networks: torchvision, timm, transformers, open_clip and imgcls itself."""
