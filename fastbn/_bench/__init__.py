"""_bench -- how fast fastbn is: ``python -m fastbn bench`` and the suite in benchmarks/ are two faces of this package.

cases.py says what can be measured, data.py holds the numbers and what must come of them, peers.py and onednn.py are
what takes part, engine.py measures, report.py shows, cli.py is the command. A peer is imported only when asked for.
"""
