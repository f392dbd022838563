"""What a run goes on with (``step_<n>``), and what it leaves for others (``epoch_<n>``)."""
