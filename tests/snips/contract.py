"""SNIPS as tool calling: the seven intents are tools, their slots are arguments. Copied to task/contract.py of a project."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, create_model

from slm.contract import Contract

Slot = str | Annotated[list[str], Field(min_length=2)]  # a list where a slot occurs twice
# The order of the arguments is the order in which they mostly come in a sentence.
SLOTS = {
    "AddToPlaylist": "entity_name artist music_item playlist_owner playlist",
    "BookRestaurant": "sort restaurant_name restaurant_type party_size_description cuisine spatial_relation party_size_number "
    "served_dish facility timeRange poi city country state",
    "GetWeather": "condition_description condition_temperature geographic_poi spatial_relation timeRange current_location city "
    "country state",
    "PlayMusic": "track album sort playlist music_item genre artist year service",
    "RateBook": "object_name object_select object_type object_part_of_series_type rating_value rating_unit best_rating",
    "SearchCreativeWork": "object_type object_name",
    "SearchScreeningEvent": "object_type movie_name movie_type spatial_relation object_location_type location_name timeRange",
}


class Strict(BaseModel):
    """No field beyond those named; a slot that is not in the request is left out."""

    model_config = ConfigDict(extra="forbid")


def tool(name):
    """The model of one tool; every argument may be left out."""
    arguments = create_model(f"{name}Arguments", __base__=Strict, **{slot: (Slot, None) for slot in SLOTS[name].split()})
    return create_model(name, __base__=Strict, tool=(Literal[name], ...), arguments=(arguments, ...))


AddToPlaylist, BookRestaurant, GetWeather, PlayMusic, RateBook, SearchCreativeWork, SearchScreeningEvent = map(tool, SLOTS)


class Call(RootModel):
    """Exactly one call; the tool decides which arguments there may be."""

    root: (
        AddToPlaylist | BookRestaurant | GetWeather | PlayMusic | RateBook | SearchCreativeWork | SearchScreeningEvent
    ) = Field(discriminator="tool")  # fmt: skip


contract = Contract(
    name="snips",
    task_type="tool_calling",
    output=Call,
    system_prompt="Tool call",  # read with every row: short is fast, and training says the rest
    critical=("tool",),
    primary_metric="exact_match",
    target=0.8,
    label_field="tool",
    brief={
        "goal": "Turn one request to a voice assistant into one of seven tool calls; the arguments are words of the request.",
        "inputs": "One spoken or typed sentence in English, 4 to 20 words, often without capitals, with misspelt names.",
        "non_goals": "No resolving: dates, places and titles stay as they were said. No eighth tool, no refusal.",
        "failure_modes": "The wrong tool; an argument that the request does not hold; two arguments exchanged.",
        "deployment_target": "llama.cpp on a small computer without a network.",
        "cost_and_latency": "At most 2 seconds for a lone request.",
    },
)
