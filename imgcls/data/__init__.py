"""Files, manifests and pixels: everything below the model, without Ray."""
