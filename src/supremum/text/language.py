"""The language of a text: its script, then the share of function words.

A script that one language uses decides alone (Hangul: ko, kana: ja, Han without kana: zh, Greek, Thai, ...). Among the
languages of Latin, Cyrillic and Arabic script, each word of a language's list (the most frequent first) is evidence of

    ln(1 + p / RARE) nats for it,    p = ZIPF / (rank + 3) (Zipf's law),    RARE: the frequency of words of no list,

and so is, with LETTER nats, each letter that only some of the languages use; that a text of n letters has none of a
language's own counts n times their share against it. The confidence is the winner's share of
the exponentials, beside one for no evidence at all, times the script's share of the letters. "und" is undetermined.

Function words tell languages apart from about ten words on (Grefenstette 1995, Comparing two language identification
schemes). docs/text.md holds the measured accuracy.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict

from .words import words

UNKNOWN = "und"
ZIPF, RARE, LETTER = 0.1, 1e-3, 1.5
SAMPLE = 4096  # characters that are looked at, from the middle of a longer text
SCRIPTS = {
    "latin": "a-zA-Z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff", "cyrillic": "\u0400-\u052f",
    "arabic": "\u0620-\u06ff\u0750-\u077f",
    "han": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff", "kana": "\u3041-\u30ff", "hangul": "\uac00-\ud7af",
    "el": "\u0370-\u03ff\u1f00-\u1fff", "he": "\u05d0-\u05ea", "th": "\u0e01-\u0e4e", "devanagari": "\u0900-\u097f",
    "bn": "\u0980-\u09ff", "pa": "\u0a00-\u0a7f", "gu": "\u0a80-\u0aff", "ta": "\u0b80-\u0bff", "te": "\u0c00-\u0c7f",
    "kn": "\u0c80-\u0cff", "ml": "\u0d00-\u0d7f", "si": "\u0d80-\u0dff", "lo": "\u0e80-\u0eff", "my": "\u1000-\u109f",
    "ka": "\u10a0-\u10ff", "hy": "\u0530-\u058f", "am": "\u1200-\u137f", "km": "\u1780-\u17ff", "bo": "\u0f00-\u0fff",
}  # fmt: skip
ONE = {"hangul": "ko", "kana": "ja", "han": "zh", "devanagari": "hi"}
_LETTERS = {name: re.compile(f"[{letters}]") for name, letters in SCRIPTS.items()}

FUNCTION_WORDS = {  # the most frequent first
    "en": "the of and to in a is that it for was on are as with his they be at one have this from or had by but not what "
          "all were we when your can said there an which she do their if will up other about out many then them these so "
          "some her would him into has two could than been who its now did may i you he my no me how our just like more "
          "any very over while man people here where only also because well",
    "de": "der die und das den von zu mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er hat "
          "dass sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur oder aber vor zur bis "
          "mehr durch man sein wurde sei kann gegen vom schon wenn ich wir was ihre unter mich dir ihr zwei während seine",
    "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il sont avec son aux "
          "cette ou ses mais nous comme elle été deux leur même tout bien y sans fait était ont peut aussi ils je vous "
          "très être sous dont ces où si entre après lui",
    "es": "de la que el en y a los se del las un por con no una su para es al lo como más pero sus le ya o fue este ha sí "
          "porque esta son entre cuando muy sin sobre ser también me hasta hay donde quien desde todo nos durante todos "
          "uno les ni contra otros ese eso ante ellos e esto mí antes algunos qué unos yo otro era está",
    "it": "di e il la che in un a per è una del non sono le si con i da della al come dei ha più anche ma nel lo gli alla "
          "se ci suo delle o su sua dal era questo questa dalla essere hanno tra due molto dopo nella fra ancora cui "
          "degli io perché quando tutti ai solo fatto stato",
    "pt": "de a o que e do da em um para é com não uma os no se na por mais as dos como mas foi ao ele das tem à seu sua "
          "ou ser quando muito há nos já está eu também só pelo pela até isso ela entre era depois sem mesmo aos ter seus "
          "quem nas me esse eles estão você tinha foram essa num nem suas meu às minha têm são",
    "nl": "de van het een en in is dat op te zijn met voor niet aan er om ook als dan maar bij uit nog naar door over ze "
          "wordt heeft hij deze of worden kan al werd meer was hebben tot zou wel geen ik je haar dit zo wat onder mijn "
          "ons die had tegen na twee moet veel zich jaar hun",
    "sv": "och att det i en jag som på är av för med den till ett var om har de inte han men så från vi du kan när år "
          "under sig efter hade eller vid sin skulle ut upp hon ska dem nu bara mot här hur mycket detta dess över mig "
          "finns blev",
    "da": "og at det i en jeg som på er af for med den til et var om har de ikke han men så fra vi du kan når år under "
          "sig efter havde eller ved sin skulle ud op hun skal dem nu bare mod her hvor meget dette også blev være noget",
    "no": "og at det i en jeg som på er av for med den til et var om har de ikke han men så fra vi du kan når år under "
          "seg etter hadde eller ved sin skulle ut opp hun skal dem nå bare mot her hvor mye dette også ble være noe",
    "fi": "ja on ei se että oli hän mutta ovat kun niin tai myös joka sen kuin jos ole hänen olla mukaan vain jo sekä voi "
          "ollut nyt mitä siitä minä tämä tässä sitä ne mikä kaikki vielä ennen jotka jälkeen kanssa",
    "pl": "w i na z do się nie że jest to o jak za od po przez ale dla co tak są oraz a ich jego czy był tym już tylko "
          "może być ma ze było przy też które która który pod bardzo jej go lub jako mnie ten",
    "cs": "a se v na je že o s z do i to za by pro ve k po jako ale jsem si od jsou která který které při jeho tak než "
          "není už jen ze byl bylo podle být co má však když před také nebo jak až ten",
    "sk": "a sa v na je že o s z do i to za by pre vo k po ako ale som si od sú ktorá ktorý ktoré pri jeho tak než nie už "
          "len zo bol bolo podľa byť čo má však keď pred tiež alebo až ten",
    "hu": "a az és hogy nem is egy meg ez de csak már volt ha vagy még van mint azt ki el ezt lesz sem minden be kell "
          "lehet én úgy mert olyan után több ami aki között ezek pedig majd nagyon",
    "ro": "și de în la a că pe cu din nu o un este pentru mai să care se ce sunt fi au ca sau dar după prin lui între "
          "fost această acest ei era ar fără când foarte până iar lor dintre",
    "hr": "i u je na se da su za od s o a ne to koji kao iz će do bi što ali po te sam ili nije bio kako samo već koja "
          "koje biti njegov prema još više sve ima može",
    "tr": "ve bir bu da de için ile çok olarak daha en gibi olan kadar sonra o ne var ama ki değil her ya ben mi olduğu "
          "oldu tarafından ancak veya kendi şey göre diye iki hem bunu",
    "vi": "và của là có trong được cho các một với không những người đã này khi từ đến về như ra để năm tại cũng nhiều "
          "vào hơn tôi thì sẽ đó bị theo trên rất nhưng đang phải làm",
    "id": "yang dan di dari untuk dengan pada ini itu dalam tidak akan adalah ke oleh juga sebagai atau telah tersebut "
          "bisa ada mereka saya karena lebih dapat kami sudah kita menjadi orang satu saat hanya seperti",
    "ca": "de la i que el a en un per les del amb és una no al els es se com més va són dels seu aquest ha però ser també "
          "aquesta molt quan sobre entre fins perquè on fa havia hi",
    "ru": "и в не на я что с он а как это по но к у из за то от так же все она для о его бы мы вы было только был если "
          "или уже при они еще ее мне этого чтобы до когда был были который",
    "uk": "і в не на що я з у та до це як за але від так по він для його вона ми про ви було бути або вже при вони ще її "
          "мені щоб коли який є ж були також цього після був",
    "bg": "и на в да се за е от не са че по с като до това ще си или но при има след със който които беше може през този "
          "само още тя той ни към във бъде",
    "sr": "и у је на се да су за од с о а не то који као из ће до би што али по те сам или није био како само већ која "
          "које",
    "ar": "في من على أن إلى هذا التي عن مع الذي كان لا ما هذه بعد كل قد بين ذلك أو كما غير حتى لم هو هي إن كانت عند منذ "
          "خلال",
    "fa": "و در به از که این را با است برای آن یک خود تا کرد بر هم نیز شد می شود ها دارد ما او بود آنها اما یا هر گفت",
    "ur": "کے کی میں اور ہے سے کا کو اس نے پر ہیں کہ یہ بھی ایک تھا ان جو ہو کر تو نہیں گیا تھے وہ لیے",
}  # fmt: skip
LETTERS = {  # beyond those of English, Russian and Arabic or not in all of the script's languages; and their rough share
    "de": ("äöüß", 0.018), "fr": ("éèêçàœùâîô", 0.035), "es": ("ñáíóúé¿¡", 0.025), "it": ("àèéìòù", 0.008),
    "pt": ("ãõçáéíóúâê", 0.04), "sv": ("åäö", 0.045), "da": ("æøå", 0.02), "no": ("æøå", 0.018), "fi": ("äö", 0.055),
    "pl": ("ąćęłńóśźż", 0.065), "cs": ("áčďéěíňóřšťúůýž", 0.14), "sk": ("áäčďéíĺľňóôŕšťúýž", 0.12),
    "hu": ("áéíóöőúüű", 0.11), "ro": ("ăâîșțşţ", 0.06), "hr": ("čćđšž", 0.025), "tr": ("çğıöşü", 0.09),
    "vi": ("ăâđêôơưàáạảãằắặẳẵầấậẩẫèéẹẻẽềếệểễìíịỉĩòóọỏõồốộổỗờớợởỡùúụủũừứựửữỳýỵỷỹ", 0.25), "ca": ("àèéíòóúç", 0.03),
    "ru": ("ыэё", 0.022), "uk": ("іїєґ", 0.09), "bg": ("ъщ", 0.025), "sr": ("ђјљњћџ", 0.06),
    "ar": ("ةىيك", 0.1), "fa": ("پچژگکی", 0.15), "ur": ("ٹڈڑںےہھ", 0.15),
}  # fmt: skip
FAMILY = {code: "cyrillic" if code in ("ru", "uk", "bg", "sr") else "arabic" if code in ("ar", "fa", "ur") else "latin"
          for code in FUNCTION_WORDS}
LANGUAGES = tuple(sorted({*FUNCTION_WORDS, *ONE.values(), *(name for name in SCRIPTS if len(name) == 2)}))


def _evidence() -> dict[str, dict[str, dict[str, float]]]:
    """family -> word or letter -> language -> nats for it."""
    table: dict[str, dict[str, dict[str, float]]] = {"latin": {}, "cyrillic": {}, "arabic": {}}
    for code, text in FUNCTION_WORDS.items():
        for rank, word in enumerate(dict.fromkeys(text.split())):
            table[FAMILY[code]].setdefault(word, {})[code] = math.log1p(ZIPF / (rank + 3) / RARE)
    for code, (letters, _) in LETTERS.items():
        for letter in letters:
            table[FAMILY[code]].setdefault(f"letter {letter}", {})[code] = LETTER
    return table


_EVIDENCE = _evidence()
_MARKS = {family: set("".join(letters for code, (letters, _) in LETTERS.items() if FAMILY[code] == family))
          for family in _EVIDENCE}


def language(text: str) -> tuple[str, float]:
    """(ISO 639-1 code or "und", confidence from 0 to 1)."""
    if len(text) > SAMPLE:
        start = (len(text) - SAMPLE) // 2
        text = text[start:start + SAMPLE]
    counts = {name: len(pattern.findall(text)) for name, pattern in _LETTERS.items()}
    if not any(counts.values()):
        return UNKNOWN, 0.0
    # a Han character or a syllable says as much as two or three letters, and a page in them holds Latin names and addresses
    weights = {name: count * (3 if name in ("han", "kana", "hangul") else 1) for name, count in counts.items()}
    if counts["kana"] * 10 > counts["han"]:  # Japanese writes with both; quoted kana in Chinese are fewer
        weights["kana"] += weights.pop("han")
    script = max(weights, key=lambda name: weights[name])
    share = weights[script] / sum(weights.values())
    if script not in _EVIDENCE:
        return ONE.get(script, script), share
    evidence, lowered = _EVIDENCE[script], text.lower()
    nats: dict[str, float] = defaultdict(float)
    for word in words(lowered):
        for code, value in evidence.get(word, {}).items():
            nats[code] += value
    marks = _MARKS[script].intersection(lowered)
    for letter in marks:
        for code, value in evidence[f"letter {letter}"].items():
            nats[code] += value * min(3, lowered.count(letter))
    if not nats:
        return UNKNOWN, 0.0
    for code in nats:
        letters, rate = LETTERS.get(code, ("", 0.0))
        if marks.isdisjoint(letters):  # ln of the chance of none, (1 - rate)^letters
            nats[code] -= min(rate * counts[script], 20)
    best = min(nats, key=lambda code: (-nats[code], code))
    others = sum(math.exp(value - nats[best]) for value in nats.values()) + math.exp(-nats[best])
    return best, share / others
