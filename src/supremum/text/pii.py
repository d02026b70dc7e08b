"""Personal data by pattern and checksum: e-mail addresses, phone numbers, IP addresses, IBANs, payment cards.

    IBAN  (ISO 13616)       the country's length, and the rearranged number modulo 97 = 1 (ISO 7064)
    card  (ISO/IEC 7812-1)  13 to 19 digits of a network's range whose Luhn sum is divisible by 10
    IP    (RFC 791, 4291)   what the standard library's ipaddress accepts; loopback and "any" addresses stay
    phone (ITU-T E.164)     "+" and 8 to 15 digits; or national forms: (0xx) xxxx, xxx-xxx-xxxx, mainland China's mobiles

Each becomes <EMAIL>, <PHONE>, <IP>, <IBAN>, <CARD>. Names and postal addresses need a model and are not found here.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Collection

LENGTHS = {  # of an IBAN, by country (the SWIFT registry)
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28, "CH": 21,
    "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FO": 18, "FR": 27,
    "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26,
    "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20, "LV": 21, "LY": 25, "MC": 27,
    "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18, "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25,
    "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SD": 18, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28,
    "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20}  # fmt: skip
CARDS = re.compile(r"4|5[1-5]|2(?:2[2-9]|[3-6]|7[01]|720)|3[47]|3(?:0[0-5]|[689])|6(?:011|4[4-9]|5)|62|35(?:2[89]|[3-8])")


def luhn(digits: str) -> bool:
    """Whether the last digit checks the others: every second from the right doubled, digit sums added."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 * (value > 9)
    return total % 10 == 0


def iban(text: str) -> bool:
    number = re.sub(r"[ -]", "", text).upper()
    if LENGTHS.get(number[:2]) != len(number):
        return False
    return int("".join(str(int(c, 36)) for c in number[4:] + number[:4])) % 97 == 1


def card(text: str) -> bool:
    digits = re.sub(r"[ -]", "", text)
    return 13 <= len(digits) <= 19 and bool(CARDS.match(digits)) and luhn(digits) and len(set(digits)) > 1


def address(text: str) -> bool:
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return False
    return bool(re.search("[0-9]", text)) and not (found.is_loopback or found.is_unspecified)


def phone(text: str) -> bool:
    digits = re.sub(r"\D", "", text)
    return 8 <= len(digits) <= 15 and len(set(digits)) > 1


# ASCII digits only, and bounded repetitions: the time is linear in the text. Order matters: a card is no phone number.
KINDS: dict[str, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "email": (re.compile(r"(?<![\w.+%-])[a-z0-9][\w.+%-]{0,63}@(?:[^\W_](?:[\w-]{0,62})\.){1,8}[^\W\d_]{2,24}(?![\w-])",
                         re.IGNORECASE), lambda text: ".." not in text),
    "iban": (re.compile(r"(?<!\w)[A-Z]{2}[0-9]{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,4})?(?!\w)"), iban),
    "card": (re.compile(r"(?<![\w.+-])[0-9](?:[ -]?[0-9]){12,18}(?![\w-]|\.[0-9])"), card),
    "ip": (re.compile(r"(?<![\w.:])(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3}|(?=[0-9a-fA-F]{0,4}:)[0-9a-fA-F:]{2,39}"
                      r"(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3})?)(?![\w:]|\.[0-9])"), address),
    "phone": (re.compile(
        r"(?<![\w.+/-])(?:\+[0-9](?:[ .()/-]{0,2}[0-9]){7,14}"
        r"|\(0?[0-9]{2,5}\)[ -]?[0-9]{2,4}(?:[ .-]?[0-9]{2,4}){1,3}"
        r"|(?:1[ .-])?[2-9][0-9]{2}([ .-])[0-9]{3}\1[0-9]{4}"
        r"|0[1-9][0-9]{1,4}[ /-][0-9]{2,4}(?:[ -]?[0-9]{2,4}){1,3}"
        r"|1[3-9][0-9]{9})(?![\w-]|\.[0-9])", re.ASCII), phone),
}


def mask_pii(text: str, kinds: Collection[str] = tuple(KINDS)) -> tuple[str, Counter[str], list[str]]:
    """The text with each find replaced, how many of each kind, and the finds, themselves masked but for two characters."""
    counts: Counter[str] = Counter()
    finds: list[str] = []
    for kind, (pattern, valid) in KINDS.items():
        if kind not in kinds:
            continue

        def replace(match: re.Match[str], kind: str = kind, valid: Callable[[str], bool] = valid) -> str:
            if not valid(match[0]):
                return match[0]
            counts[kind] += 1
            finds.append(f"{kind} {match[0][:2]}{'*' * (len(match[0]) - 2)}")
            return f"<{kind.upper()}>"

        text = pattern.sub(replace, text)
    return text, counts, finds
