"""How points move: their gradient, the rules, and their part in an optimizer's step."""
