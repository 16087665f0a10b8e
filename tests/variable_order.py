"""Whether every read of a variable in a graph waits for its writes, or they for it: else chance decides."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import tensorflow.compat.v1 as tf


class Accesses:
    """Reads and writes of resource variables among `nodes`; `others` {name: node} are where handles may come from."""

    def __init__(self, nodes: Collection[tf.NodeDef], others: Mapping[str, tf.NodeDef]) -> None:
        self._others = others
        self._users: dict[str, list[str]] = defaultdict(list)
        self.reads: dict[str, list[str]] = defaultdict(list)
        self.writes: dict[str, list[str]] = defaultdict(list)
        for node in nodes:
            for source in node.input:
                self._users[source.lstrip("^").split(":")[0]].append(node.name)
            if node.op == "ReadVariableOp":
                self._note(self.reads, node, 1)
            elif node.op.startswith("Assign"):
                self._note(self.writes, node, 1)
            elif node.op == "ResourceApplyAdam":
                self._note(self.writes, node, 3)  # the weight and both slots

    def _note(self, found: dict[str, list[str]], access: tf.NodeDef, handles: int) -> None:
        for handle in access.input[:handles]:
            node = self._others[handle.split(":")[0]]
            while node.op in ("Identity", "Enter"):
                node = self._others[node.input[0].split(":")[0]]
            found[node.name].append(access.name)

    def unordered(self) -> list[tuple[str, str]]:
        """(access, write) of the same variable of which neither waits for the other."""
        found = []
        for variable, writes in self.writes.items():
            for number, write in enumerate(writes):
                others: Iterable[str] = [*self.reads[variable], *writes[:number]]
                after = self._reached(write)
                found += [
                    (other, write) for other in others if other not in after and write not in self._reached(other)
                ]
        return found

    def _reached(self, first: str) -> set[str]:
        seen, waiting = {first}, [first]
        while waiting:
            new = [user for user in self._users[waiting.pop()] if user not in seen]
            seen.update(new)
            waiting += new
        return seen
