"""A recipe is read once for a run and handed on as text: nothing about it changes on the way, and nothing can be changed."""

import pytest
from pydantic import ValidationError

from make_us_rich.core.settings import SettingsError
from make_us_rich.models.recipe import Recipe, load_recipe


@pytest.mark.parametrize("name", ["default", "finetune", "original", "pooled"])
def test_a_recipe_comes_back_from_its_text(name):
    recipe = load_recipe(name, seed=7)
    again = Recipe.from_json(recipe.to_json())
    assert again == recipe and again.hash == recipe.hash and again.to_json() == recipe.to_json()


def test_a_recipe_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe().epochs = 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (('"hidden_size":32', '"hidden_size":"32"'), "recipe value hidden_size = '32' does not fit"),
        (('"hidden_size":32', '"hidden_size":32,"depth":3'), "recipe value depth = 3 does not fit"),
        (("{", "["), "recipe value text = .* does not fit: invalid json"),
    ],
)
def test_another_text_is_refused_in_a_sentence(change, text):
    with pytest.raises(SettingsError, match=text):
        Recipe.from_json(load_recipe().to_json().replace(*change))
