"""What logged runs say: one page with figures, from the files of Lightning's loggers alone."""
