"""What tests of several rooms share: tiny models and configs, oracles, runs in processes of their own."""
