"""Files and folders on disks, object stores and web servers, with the same functions for all."""
