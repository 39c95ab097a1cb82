"""Common English, and the merges that make each stretch of it one token."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

# Most frequent first: a small vocabulary gets the first merges only.
_LETTER_GROUPS = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me de hi ri ro "
    "ic ne ea ra ce li ch ll be ma si om ur ion ing ent tion ate ess ment able ness ight ough"
)

_WORDS = (
    "the be to of and a in that have I it for not on with he as you do at this but his by from they we say her she or "
    "an will my one all would there their what so up out if about who get which go me when make can like time no just "
    "him know take people into year your good some could them see other than then now look only come its over think "
    "also back after use two how our work first well way even new want because any these give day most us is are was "
    "were been has had did said made went got came took very much many more where why here through before between "
    "under while again never always often sometimes each every both few same own such too still might must should may "
    "shall let put keep tell ask seem feel try leave call need become mean find show hear play run move live believe "
    "hold bring happen write provide sit stand lose pay meet include continue set learn change lead understand watch "
    "follow stop create speak read allow add spend grow open walk win offer remember love consider appear buy wait "
    "serve die send expect build stay fall cut reach kill remain man woman child world life hand part place case week "
    "company system program question government number night point home water room mother area money story fact month "
    "lot right study book eye job word business issue side kind head house service friend father power hour game line "
    "end member law car city community name president team minute idea body information nothing ago parent face "
    "others level office door health person art war history party result morning reason research girl guy moment air "
    "teacher force education foot boy age policy music market sense answer better best long great little old big high "
    "different small large next early young important public bad able last whole sure true free human local late hard "
    "real easy clear recent certain strong possible full special short single low white black red green blue yellow "
    "dark light warm cold hot dry wet three four five six seven eight nine ten hundred thousand million second third "
    "once twice half however although though since until during against without within along across behind beyond "
    "around upon among toward perhaps maybe quite rather almost already yet soon later today tomorrow yesterday "
    "together alone away down off above below inside outside near far everything something anything someone anyone "
    "everyone nobody himself herself itself themselves yourself language model memory token context message session "
    "cache prompt user assistant helpful concise reply text letter sentence paragraph page paper file data code "
    "computer machine network server process function value example test error problem solution method list table "
    "order group type form field state rate step start begin finish return check save load copy share remove drop "
    "trim shift fork branch tree root leaf node river sea mountain forest garden street road bridge village town "
    "country king queen horse dog cat bird fish flower stone gold silver iron glass wood fire wind rain snow sun moon "
    "star sky earth island ship boat train window wall floor chair bed kitchen food bread milk cheese apple tea "
    "coffee wine dinner winter summer spring autumn north south east west captain doctor lady brother sister daughter "
    "son wife husband family uncle sleep dream smile laugh cry voice sound song dance silence quiet slow quick fast "
    "sharp soft sweet bitter rich poor simple strange beautiful happy sad angry afraid brave wise foolish gentle "
    "proud careful present past future century evening explain describe decide suggest require produce develop "
    "support receive agree carry break turn draw drive wear pull push throw catch fight travel arrive visit discover "
    "imagine wonder hope wish thank please hello goodbye sorry yes"
)

_SUFFIXES = ("s", "ed", "ing", "er", "ly")
_PUNCTUATION = ("\n\n", "  ", "    ", ", ", ".\n", "...", "--", "==", "//", '."', '",')


def merges(n_merges: int, spelling: dict[str, str]) -> list[tuple[str, str]]:
    """The first `n_merges` BPE merges, or as many as the stretches below give (about 8,000), by rank.

    `spelling` maps a character to the vocabulary's own: byte-level BPE writes a space as "Ġ". A later merge has a
    higher rank and cannot take part in an earlier word, so each stretch stays the single token it became.
    """
    ranks: dict[tuple[str, str], int] = {}
    for stretch in _stretches():
        spelled = [spelling.get(char, char) for char in stretch]
        while len(symbols := _encode(spelled, ranks)) > 1:
            if len(ranks) >= n_merges:
                return list(ranks)
            ranks[symbols[0], symbols[1]] = len(ranks)
    return list(ranks)


def _stretches() -> Iterator[str]:
    """What should be one token each, the most useful first: a space before a word belongs to it."""
    words = _WORDS.split()
    yield from _LETTER_GROUPS.split()
    for word in words:
        yield f" {word}"
    yield from _PUNCTUATION
    for word in words:
        yield word.capitalize()
        yield f" {word.capitalize()}"
        yield word
    for suffix in _SUFFIXES:
        yield suffix
        for word in words:
            yield f" {word.removesuffix('e') if suffix[0] in 'ei' else word}{suffix}"


def _encode(symbols: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """BPE as llama.cpp does it: the pair of the lowest rank first, the leftmost of equals."""
    symbols = list(symbols)
    unknown = len(ranks)
    while len(symbols) > 1:
        rank, at = min((ranks.get(pair, unknown), i) for i, pair in enumerate(pairwise(symbols)))
        if rank == unknown:
            break
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols
