"""Share what tests of several rooms need: tiny models and configs, oracles, runs in processes of their own."""
