"""Short texts of different kinds, to score and to go on from."""

from __future__ import annotations

TEXTS = (
    "The harbour lay still in the morning, and the fishermen mended their nets in silence.",
    "A ship came in from the north with salt, tar and a cat that belonged to nobody.",
    "When the bell rang three times, the children ran down to the water to see who it was.",
    "Nobody had written a letter for years; so the postman read the old ones once more aloud.",
    "The cat went up the hill, and from the hill it looked at the harbour, the ship and the sea.",
    "In the evening the lamps were lit one by one, and the bread on the table was still warm.",
    "港口很安静,渔夫们在修补渔网。 La mer était calme; déjà 42 bateaux, 3 ancres & 0 vent!",
    "def ships(harbour):\n    return [ship for ship in harbour if ship.sails]\n\nprint(ships([]))",
)
