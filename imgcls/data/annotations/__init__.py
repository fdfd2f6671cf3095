"""Labels that people gave to images: the labels table, and the files of labeling tools."""
