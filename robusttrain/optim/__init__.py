"""The outer minimisation: optimisers, schedules, weight averaging and weight perturbation."""
