"""Models of other libraries under our operators: `dhns_fast.integrations.pykeen` and
`dhns_fast.integrations.torch_geometric`.
"""
