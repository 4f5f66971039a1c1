"""How the loss around a point settles as samples are added."""
