"""The algorithm as the paper and the release state it: readable, dtype-generic, slow. The oracle of every test; imports
nothing of the rest.
"""
