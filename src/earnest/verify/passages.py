"""The built-in bilingual text that `verify` reads: three short passages, written for this project.

They are plain prose that any trained language model should find likely. One is a children's story
in a few hundred common words, because the smallest models know nothing else; one is encyclopaedic
English; one is modern Chinese. None quotes a published work, so no model has memorised them and
their likelihood means understanding, not recall.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Passage:
    """One built-in text.

    Attributes:
        name: a short name for tables.
        language: ISO 639-1 code.
        text: the passage, without trailing newline.
    """

    name: str
    language: str
    text: str

    @property
    def utf8_bytes(self) -> int:
        """Length in UTF-8 bytes, the denominator of bits per byte."""
        return len(self.text.encode("utf-8"))


STORY = Passage(
    name="story",
    language="en",
    text=(
        "Once upon a time, there was a little girl named Lily. She had a big red ball. Every day, "
        "she liked to play with her ball in the park. One day, Lily saw a little boy. He was very "
        'sad. "Why are you sad?" Lily asked. The boy said, "I want to play, but I don\'t have a '
        'ball." Lily smiled and said, "You can play with my ball. We can play together!" The '
        "boy was very happy. They played with the ball all day. Then Lily's mom said, \"It is "
        'time to go home." Lily said goodbye to her new friend. She was happy that she had '
        "shared her ball."
    ),
)

ENCYCLOPAEDIA = Passage(
    name="encyclopaedia",
    language="en",
    text=(
        "Water is a chemical substance made of two elements, hydrogen and oxygen. It covers about "
        "seventy percent of the surface of the Earth, mostly in the oceans. At normal pressure, "
        "water freezes at zero degrees Celsius and boils at one hundred degrees Celsius. When the "
        "sun heats the surface of the sea, some of the water turns into vapor and rises into the "
        "air. As the air cools, the vapor condenses into small drops and forms clouds. When the "
        "drops become large enough, they fall to the ground as rain or snow. The water then flows "
        "through rivers and lakes back to the sea. This process is known as the water cycle, and "
        "it is essential for all forms of life on the planet."
    ),
)

CHINESE = Passage(
    name="chinese",
    language="zh",
    text=(
        "北京是中华人民共和国的首都，也是全国的政治中心和文化中心。这座城市有三千多年的历史，"
        "保存着许多著名的古代建筑，例如故宫、天坛和长城。每年都有来自世界各地的游客到这里参观。"
        "春天的时候，公园里的花都开了，人们喜欢和家人一起出去散步。夏天天气很热，孩子们常常去游泳。"
        "秋天是北京最美的季节，天空很蓝，树叶慢慢变成了黄色和红色。冬天虽然很冷，但是下雪以后，"
        "整个城市看起来非常漂亮。随着经济的发展，人们的生活水平不断提高，交通也越来越方便。"
    ),
)

PASSAGES = (STORY, ENCYCLOPAEDIA, CHINESE)
