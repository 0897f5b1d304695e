"""The outer minimisation: optimisers, schedules, averages, and where the gradient is taken."""
