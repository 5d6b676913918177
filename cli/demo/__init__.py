"""`anneal demo`: the whole service on one small job, and a table that says whether the model got better."""
