"""The paper's experiments, run fairly: every arm tuned alike, seeds paired, the test set kept for the end.

* :mod:`arms`: what is compared; :mod:`presets`: at which size; :mod:`experiments`: which comparison each table or
  figure is.
* :mod:`protocol`: which runs a comparison needs next, given the lines so far; :mod:`search`: the same for a default.
* :mod:`runs`: one training and the JSON line that it leaves; :mod:`pool`: several at a time; :mod:`ledger`: the file of
  lines; :mod:`loss_surface`: around one network; :mod:`surfaces`: those of a comparison, and their file.
* :mod:`statistics`: paired differences and their intervals; :mod:`tables`, :mod:`plots`, :mod:`report`: what is
  written, from the lines alone.
"""
