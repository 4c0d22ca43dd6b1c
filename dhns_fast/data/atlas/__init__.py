"""The embedded data set "atlas": a multimodal knowledge graph of the world, read by `dhns_fast.data.load("atlas")`.

4271 entities (countries, continents, subregions, administrative regions, cities, time zones, UTC offsets, currencies,
units of money, languages, scripts, language groups), 17 relations and 15180 triples: 12181 train, 1500 valid, 1499
test.

Modalities, float16 features [E, D] and the bool mask `present` [E]:
    text   D 128, all 4271 entities: sentence embeddings of a description that, its own name aside, tells of no linked
           entity
    image  D 64, 246 countries: colours, layout and edges of the national flag
    geo    D 33, places and time zones: the point on the unit sphere and its Fourier features

Sources, licences, selection and split: ATTRIBUTION.md in this folder. Rebuilt by `python tools/build_atlas.py`.
"""
