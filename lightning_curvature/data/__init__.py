"""The samples that curvature is measured on, read without moving the user's loader."""
