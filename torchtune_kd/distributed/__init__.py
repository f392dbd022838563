"""The processes of a run, and how models are sharded over them."""
