"""Manifests: tables, folders, archives and data sets that list the images."""
