"""The paper's experiments, run fairly: every arm tuned alike, seeds paired, the test set kept for the end.

* :mod:`arms`: what is compared; :mod:`presets`: at which size.
* :mod:`runs`: one training and the JSON line that it leaves; :mod:`ledger`: the file of lines.
* :mod:`experiments`: which runs each table or figure needs next, given the lines so far.
* :mod:`statistics`: paired differences and their intervals; :mod:`report`: tables and pictures from the lines.
"""
