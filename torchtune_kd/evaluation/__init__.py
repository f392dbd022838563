"""How far a student is from its teacher, and how fast it writes."""
