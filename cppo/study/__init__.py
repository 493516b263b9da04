"""A controlled study: variants of a run on the built-in task, over seeds, at equal data and steps.

`plan.py` makes runs of a study's settings; `jobs.py` does them side by side, each in a process of
its own (`worker.py`), whose figures `results.py` keeps in one small file a run. All that is
reported (`summary.py`, `tables.py`, `plots.py`) is made from these files alone.
"""
