"""`run.py validate`: does a checkpoint compute what it should on this machine?"""
