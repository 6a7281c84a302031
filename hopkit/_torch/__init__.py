"""The seam: the only folder that names private torch. One file per area, each name once, with what it is for.

Every name here was seen in torch 2.13.0 and 2.14.1. ``tests/canary`` asks a release for all of them and says which
feature of hopkit a lost one takes with it.
"""
