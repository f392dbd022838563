"""What a teacher said about documents, on disk: layout, shards, and reading them while a student trains."""
