"""The model card and the upload of a student."""
