"""Plain data that the passes read and write: token layouts, plans, example inputs. No torch.fx."""
