"""A teacher's outputs on disk: what is stored, shard by shard, and how it is read by image and view."""
