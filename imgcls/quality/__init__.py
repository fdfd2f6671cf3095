"""What is wrong with a data set: bad images, copies, leaks, labels that look mistaken."""
