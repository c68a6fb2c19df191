"""Which layers to convert, under a budget: every site's damage to the model's output is measured, and the best set is chosen."""
