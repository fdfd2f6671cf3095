"""Files, manifests and pixels: everything below the model, without Ray.

storage:    files and folders on disks, object stores and web servers
containers: archives, and tables with a column of images, whose members are read one by one
manifests:  the tables of the images to be read
decoding:   from the bytes of an image to the pixels that a network takes
"""
