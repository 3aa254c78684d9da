"""`shard` under its old address, for one release: it is now in `hf_kdtl.trainer.sharding`."""

from hf_kdtl.trainer.sharding import shard

__all__ = ["shard"]
