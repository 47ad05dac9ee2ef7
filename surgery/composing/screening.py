"""Which methods the planner need not measure in every layer: a few layers show that they cannot help at its budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .choosing import least_bytes
from .costs import Costs, Method, key_of, method_of
from .settings import Setting

SAMPLED = 3
"""Layers, spread over the depth, that stand for all of them."""
FROM = 4 * SAMPLED
"""Layers of a model from which on a few of them are looked at first: with fewer hardly any time is saved."""
MARGIN = 4.0
"""A method must be of no use in those layers even if it cost so many times less."""


@dataclass(frozen=True, kw_only=True)
class Screen:
    """Asks of a method, measured in a few layers, whether any of its settings can be a part of the best composition.

    Bytes have a price in nats at the budget: the multiplier of the best composition of what is known already, in the
    relaxation in which layers choose for themselves. There a layer takes the setting of the least cost and price, and
    no other can be of use. A setting costs at least what its first step does and what its eviction does alone. For the
    race, settings of one axis must also cost more than the best known one that all layers can take.
    """

    settings: Sequence[Setting]
    """All of them, the one that changes nothing first."""
    layers: Sequence[int]
    """By place."""
    budget: int
    """Bytes of one sequence."""
    kept: Collection[int] = ()
    """Layers that stay as they are."""

    def sample(self, method: Method, costs: Costs) -> list[int]:
        """Layers in which the method is to be measured first; none where it is to be measured in all at once."""
        plain, known = self.settings[0], self._known(method, costs)
        own = self._own(method)
        places = [
            place
            for place, layer in enumerate(self.layers)
            if layer not in self.kept and any(s.bytes_of[place] != plain.bytes_of[place] for s in own)
        ]
        if len(places) < FROM or least_bytes([plain, *known], self.layers, self.kept) > self.budget:
            return []
        return spread([self.layers[place] for place in places], SAMPLED)

    def is_beaten(self, method: Method, costs: Costs, found: Mapping[str, Mapping[int, float]]) -> bool:
        """Whether no setting of a method is of use in any of the layers in which it was measured.

        Args:
            found: what its first steps cost alone, by `key_of` and layer.
        """
        own, known, sampled = self._own(method), self._known(method, costs), list(next(iter(found.values())))
        price = self._price(known, costs)
        for layer in sampled:
            place = self.layers.index(layer)
            least = min(costs.of(s, layer) + price * s.bytes_of[place] for s in [self.settings[0], *known])
            if any(self._least_cost(s, layer, found, costs) + price * s.bytes_of[place] <= least for s in own):
                return False
        singles = [s for s in known if len(s.steps) == 1 and sum(s.bytes_of) <= self.budget]
        uniform = min((sum(costs.of(s, layer) for layer in sampled) for s in singles), default=None)
        for setting in own:
            if len(setting.steps) == 1 and sum(setting.bytes_of) <= self.budget:
                cost = sum(self._least_cost(setting, layer, found, costs) for layer in sampled)
                if uniform is None or cost <= uniform:
                    return False
        return True

    def _own(self, method: Method) -> list[Setting]:
        return [s for s in self.settings[1:] if method_of(s) == method]

    def _known(self, method: Method, costs: Costs) -> list[Setting]:
        """Settings of other methods whose costs are known."""
        return [s for s in self.settings[1:] if method_of(s) != method and costs.knows(s)]

    def _least_cost(
        self, setting: Setting, layer: int, found: Mapping[str, Mapping[int, float]], costs: Costs
    ) -> float:
        cost = found[key_of(setting.steps[:1])][layer] / MARGIN
        for step, axis in zip(setting.steps[1:], setting.axes[1:], strict=True):
            if axis == "retain":
                cost += costs.measured.get(key_of([step]), {}).get(layer, 0.0)
        return cost

    def _price(self, known: Sequence[Setting], costs: Costs) -> float:
        """Nats per byte at which layers that choose for themselves take the budget, nearly."""
        offers = []
        for place, layer in enumerate(self.layers):
            some = [self.settings[0], *([] if layer in self.kept else known)]
            offers.append([(costs.of(s, layer), s.bytes_of[place]) for s in some])

        def taken(price: float) -> int:
            return sum(min(some, key=lambda offer: offer[0] + price * offer[1])[1] for some in offers)

        low, high = 0.0, 1e-12
        while taken(high) > self.budget and high < 1e6:
            low, high = high, high * 4
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if taken(middle) > self.budget else (low, middle)
        return high


def spread(layers: Sequence[int], count: int) -> list[int]:
    """So many of the layers, evenly over the depth."""
    return [layers[(2 * i + 1) * len(layers) // (2 * count)] for i in range(count)]
