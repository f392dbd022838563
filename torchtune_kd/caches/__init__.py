"""Keep on disk what a teacher said about documents: layout, shards, and reading them while a student trains."""
