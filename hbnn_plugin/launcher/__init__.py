"""``python -m hbnn_plugin train.py``: the retrofit without touching the script."""
