"""What a student is measured against."""
