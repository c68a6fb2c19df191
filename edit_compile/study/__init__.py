"""Studies: several ways to convert and distil one model, compared at equal budgets over several seeds."""
