"""The forty tasks of LIBERO's four suites in the benchmark's order: file stems, task ids,
instructions.
"""

from __future__ import annotations

import re

_BOWL = (
    "between_the_plate_and_the_ramekin",
    "next_to_the_ramekin",
    "from_table_center",
    "on_the_cookie_box",
    "in_the_top_drawer_of_the_wooden_cabinet",
    "on_the_ramekin",
    "next_to_the_cookie_box",
    "on_the_stove",
    "next_to_the_plate",
    "on_the_wooden_cabinet",
)
_GROCERIES = (
    "alphabet_soup",
    "cream_cheese",
    "salad_dressing",
    "bbq_sauce",
    "ketchup",
    "tomato_sauce",
    "butter",
    "milk",
    "chocolate_pudding",
    "orange_juice",
)
_LIVING, _KITCHEN = "LIVING_ROOM_SCENE", "KITCHEN_SCENE"

SUITES: dict[str, tuple[str, ...]] = {
    "libero_spatial": tuple(
        f"pick_up_the_black_bowl_{at}_and_place_it_on_the_plate" for at in _BOWL
    ),
    "libero_object": tuple(f"pick_up_the_{item}_and_place_it_in_the_basket" for item in _GROCERIES),
    "libero_goal": (
        "open_the_middle_drawer_of_the_cabinet",
        "put_the_bowl_on_the_stove",
        "put_the_wine_bottle_on_top_of_the_cabinet",
        "open_the_top_drawer_and_put_the_bowl_inside",
        "put_the_bowl_on_top_of_the_cabinet",
        "push_the_plate_to_the_front_of_the_stove",
        "put_the_cream_cheese_in_the_bowl",
        "turn_on_the_stove",
        "put_the_bowl_on_the_plate",
        "put_the_wine_bottle_on_the_rack",
    ),
    "libero_10": (
        f"{_LIVING}2_put_both_the_alphabet_soup_and_the_tomato_sauce_in_the_basket",
        f"{_LIVING}2_put_both_the_cream_cheese_box_and_the_butter_in_the_basket",
        f"{_KITCHEN}3_turn_on_the_stove_and_put_the_moka_pot_on_it",
        f"{_KITCHEN}4_put_the_black_bowl_in_the_bottom_drawer_of_the_cabinet_and_close_it",
        f"{_LIVING}5_put_the_white_mug_on_the_left_plate_and_put_the_yellow_and_white_mug_on_the_right_plate",
        "STUDY_SCENE1_pick_up_the_book_and_place_it_in_the_back_compartment_of_the_caddy",
        f"{_LIVING}6_put_the_white_mug_on_the_plate_and_put_the_chocolate_pudding_to_the_right_of_the_plate",
        f"{_LIVING}1_put_both_the_alphabet_soup_and_the_cream_cheese_box_in_the_basket",
        f"{_KITCHEN}8_put_both_moka_pots_on_the_stove",
        f"{_KITCHEN}6_put_the_yellow_and_white_mug_in_the_microwave_and_close_it",
    ),
}


def locate_task(name: str) -> tuple[str, int] | None:
    """(suite, task id) of a task's file stem such as `turn_on_the_stove`; None when it is not of
    the forty.
    """
    for suite, names in SUITES.items():
        if name in names:
            return suite, names.index(name)
    return None


def instruction_of(name: str) -> str:
    """The instruction LIBERO reads out of a task's file stem (scene prefix removed, spaces)."""
    return re.sub(r"^[A-Z_]+_SCENE\d+_", "", name).replace("_", " ")


# What the benchmark's own task files say otherwise than the name does.
_SPOKEN = {
    "pick the akita ": "pick up the ",
    "pick the ": "pick up the ",
    "cookies box": "cookie box",
    "top layer of the wooden cabinet": "top drawer of the wooden cabinet",
    "middle layer of the drawer": "middle drawer of the cabinet",
    "top layer of the drawer": "top drawer",
    "on the top of the drawer": "on top of the cabinet",
    "cream cheese on the bowl": "cream cheese in the bowl",
}


def locate_instruction(text: str) -> tuple[str, int] | None:
    """(suite, task id) of an instruction, in the words of the task's name or of LIBERO's task
    files; None when it is not of the forty.
    """
    text = " ".join(text.lower().split())
    for said, named in _SPOKEN.items():
        text = text.replace(said, named)
    for suite, names in SUITES.items():
        for task, name in enumerate(names):
            if instruction_of(name) == text:
                return suite, task
    return None
