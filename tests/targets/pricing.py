"""A shop whose prices are made and sorted for ever; it says where its functions are."""

import dis
import json
import pathlib
import types


class Shop:
    def __init__(self):
        self.prices = [number * 7 % 101 for number in range(500)]

    def total(self):
        found = 0
        for price in self.prices:
            found += price * price
        return found

    def ranked(self):
        return sorted(self.prices, key=self.key)

    @staticmethod
    def key(price):
        return -price


def parse(times):
    found = 0
    for number in range(times):
        found += number % 7
    return found


def main():
    shop = Shop()
    while True:
        parse(3000)
        shop.total()
        shop.ranked()


def lines_of(code, prefix=""):
    """Return the first line and all lines of each function, by qualname."""
    lines = {line for _, line in dis.findlinestarts(code) if line}
    name = prefix + code.co_name
    found = {name: [code.co_firstlineno, sorted(lines | {code.co_firstlineno})]}
    inner = "" if code.co_name == "<module>" else f"{name}."
    is_function = inner and code.co_flags & 2  # CO_NEWLOCALS: a class has none
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            found.update(lines_of(const, inner + "<locals>." * bool(is_function)))
    return found


if __name__ == "__main__":
    source = pathlib.Path(__file__).read_bytes()
    print(json.dumps(lines_of(compile(source, __file__, "exec"))), flush=True)
    main()
