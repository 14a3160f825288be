"""Write data/support_desk/: dialogues of the service desk of Lumo, a coffee machine maker we made up.

Everything a model has to learn is house knowledge: what the fault codes of three machines mean,
the terms of the shop, the wording of a reply, and which of two functions answers a request about
an order. Held-out dialogues ask with phrasings, order numbers and code-and-machine pairs that
training never shows. Output is a function of the seed alone.

    python scripts/make_support_desk.py
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "data" / "support_desk"
MACHINES = ("Lumo One", "Lumo Duo", "Lumo Pro")

# code: (what it means, what to do)
FAULTS = {
    "E1": ("the water tank is empty", "Fill the tank to the line and press Start twice"),
    "E2": ("the grinder is blocked", "Switch off, empty the bean hopper and brush the grinder"),
    "E3": ("the boiler is too hot", "Leave the lid open for ten minutes and start again"),
    "E4": ("the pump draws air", "Run two cups of plain water with the steam valve open"),
    "E5": ("the drip tray is full", "Empty the tray and push it in until it clicks"),
    "E6": ("the brew group is not locked", "Turn the blue lever to the right until it clicks"),
    "E7": ("the descaling is overdue", "Start programme D with one sachet of Lumo Descaler"),
    "E8": ("the milk sensor is dirty", "Wipe the sensor with warm water and run a rinse"),
}
FAULT_QUESTIONS = (
    "My {machine} shows {code}. What now?",
    "What does {code} mean on the {machine}?",
    "There is an {code} on the display of my {machine}.",
    "{machine}, error {code}, please help.",
    "I get {code} every morning with the {machine}.",
    "The {machine} stopped and says {code}.",
    "How do I clear {code} on a {machine}?",
)
FAULT_QUESTIONS_HELD_OUT = (
    "Since today the screen of our {machine} reads {code}, what should I do?",
    "Could you tell me how to get rid of {code}? It is a {machine}.",
)
FAULT_ANSWER = "{code} on the {machine} means that {meaning}. {remedy}. If it comes back, write to us with the serial number."

# topic: (questions, held-out question, answer)
TERMS = {
    "return": (
        ("Can I return my machine?", "How long may I send a machine back?", "I do not like my Lumo, can it go back?", "What is your return policy?"),
        "I changed my mind about the coffee machine, until when can I give it back?",
        "You can return any Lumo within 45 days, even used. Choose Return in your account and we send a free label the same day.",
    ),
    "warranty": (
        ("How long is the warranty?", "Is my machine still under warranty?", "What does the guarantee cover?", "For how many years do you repair for free?"),
        "My machine is two years old, would a repair be covered?",
        "Every Lumo has a 4 year warranty on pump, boiler and grinder. Seals and filters are wearing parts and are covered for 6 months.",
    ),
    "shipping": (
        ("How long does delivery take?", "When will my parcel arrive?", "How fast do you ship?", "Do you deliver on Saturdays?"),
        "If I order today, when is it at my door?",
        "Orders before 14:00 leave our house in Bremen the same day and arrive within 2 working days. We do not deliver on Saturdays.",
    ),
    "shipping cost": (
        ("What does shipping cost?", "Is delivery free?", "Do I pay postage?", "How much is the shipping fee?"),
        "Do I have to pay extra for having it sent?",
        "Shipping is free from 39 euros. Below that we charge 3.90 euros, and spare parts always travel for free.",
    ),
    "descaling": (
        ("How often should I descale?", "When do I need the descaler?", "How do I descale my Lumo?", "Is vinegar fine for descaling?"),
        "Can I clean out the limescale with lemon juice?",
        "Descale every 200 cups with programme D and one sachet of Lumo Descaler. Please never use vinegar or citric acid, they harm the seals.",
    ),
    "filter": (
        ("Which water filter do I need?", "When do I change the filter?", "How long does a filter last?", "Where do I buy water filters?"),
        "My filter has been in for a while, is it time for a new one?",
        "All our machines take the filter F3. Change it after 60 days or 50 litres, whichever comes first; the light turns amber in time.",
    ),
    "invoice": (
        ("Where is my invoice?", "I need a receipt for my taxes.", "Can you send me the bill again?", "How do I get an invoice in my company's name?"),
        "Our accounting asks for the bill of my order, where can I find it?",
        "Your invoice is in your account under Orders, next to the date. For a company name, add the VAT number there and a new one is made at once.",
    ),
    "beans": (
        ("Which beans do you recommend?", "Can I use any beans?", "Are oily beans a problem?", "Do you sell coffee beans?"),
        "Is very dark roasted coffee okay for the grinder?",
        "Please use medium roasts such as our Harbour Blend. Oily dark beans block the grinder, and that is not covered by the warranty.",
    ),
    "milk": (
        ("How do I clean the milk system?", "The milk foam is thin, why?", "How often should the milk hose be washed?", "Which milk foams best?"),
        "My cappuccino has hardly any foam lately, what can I do?",
        "Rinse the milk hose daily with button M and change it every 90 days. Cold milk with 3.5 percent fat foams best.",
    ),
    "discount": (
        ("Do you have a discount code?", "Is there a student discount?", "Can I get it cheaper?", "Do you offer price reductions?"),
        "Any way to save a little on a new machine?",
        "We have no codes, but refurbished machines with full warranty are 30 percent off on our Second Cup page every Tuesday.",
    ),
    "person": (
        ("Can I talk to a person?", "What is your phone number?", "I want to speak with someone.", "When is your hotline open?"),
        "Is there anybody I could call about this?",
        "Of course. Our desk is open Monday to Friday from 8 to 18 under extension 70, and a person calls you back within 20 minutes.",
    ),
    "trade-in": (
        ("Do you take old machines back?", "Can I trade in my old Lumo?", "What happens to my old machine?", "Do you recycle old machines?"),
        "I have a ten year old Lumo in the cellar, is it worth anything to you?",
        "Send us any old Lumo and you get 50 euros towards a new one. The label for it is under Trade-in in your account.",
    ),
}  # fmt: skip
THANKS = ("Thanks!", "Great, thank you.", "Perfect, thanks a lot.", "Thank you, that helps.")
GOODBYE = "With pleasure. Enjoy your coffee, your Lumo desk."

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_order",
            "description": "Status of an order",
            "parameters": {
                "type": "object",
                "properties": {"order_id": {"type": "string"}},
                "required": ["order_id"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "book_repair",
            "description": "Book a repair",
            "parameters": {
                "type": "object",
                "properties": {"serial": {"type": "string"}, "code": {"type": "string"}},
                "required": ["serial", "code"],
            },
        },
    },
]
ORDER_QUESTIONS = ("Where is order {order}?", "Has {order} been sent?", "Status of {order} please.", "I am waiting for my order {order}.")  # fmt: skip
ORDER_QUESTION_HELD_OUT = "Could you look up how far {order} is?"
ORDER_STATES = {
    "packing": "Order {order} is being packed in Bremen. It leaves today, and you get a message with the tracking link.",
    "in transit": "Order {order} is on its way. It should be with you on {day}.",
    "delivered": "Order {order} was delivered on {day}. If it is not there, ask the neighbours first and then tell us.",
    "on hold": "Order {order} is on hold because the payment is missing. Please open your account and choose Pay now.",
}
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
REPAIR_QUESTIONS = ("{code} keeps coming back, serial {serial}. Please repair it.", "I need a repair: serial {serial}, error {code}.", "Book a repair for {serial}, it shows {code}.")  # fmt: skip
REPAIR_QUESTION_HELD_OUT = "Please take my machine {serial} in for repair, {code} will not go away."
REPAIR_ANSWER = "Your repair {ticket} is booked. Put the machine in its box, the courier picks it up on {day} and you have it back within 6 days."


def user(text: str) -> dict[str, str]:
    """A user message."""
    return {"role": "user", "content": text}


def reply(text: str) -> dict[str, str]:
    """A plain reply."""
    return {"role": "assistant", "content": text}


def call(name: str, **arguments: str) -> dict[str, str]:
    """A tool call in the GLM-4 form."""
    return {"role": "assistant", "metadata": name, "content": json.dumps(arguments)}


def observation(**result: str) -> dict[str, str]:
    """What a function returned."""
    return {"role": "observation", "content": json.dumps(result)}


def fault_turn(code: str, machine: str, question: str) -> list[dict[str, str]]:
    """Question and answer about a fault code."""
    meaning, remedy = FAULTS[code]
    answer = FAULT_ANSWER.format(code=code, machine=machine, meaning=meaning, remedy=remedy)
    return [user(question.format(code=code, machine=machine)), reply(answer)]


def order_turns(dice: random.Random, question: str, state: str) -> list[dict[str, str]]:
    """A request about an order: question, call, result, answer."""
    order, day = f"LM-{dice.randrange(10000, 99999)}", dice.choice(DAYS)
    answer = ORDER_STATES[state].format(order=order, day=day)
    return [
        user(question.format(order=order)),
        call("get_order", order_id=order),
        observation(state=state, day=day),
        reply(answer),
    ]


def repair_turns(dice: random.Random, question: str) -> list[dict[str, str]]:
    """A repair: question, call, result, answer."""
    serial, code = f"S{dice.randrange(1000, 9999)}", dice.choice(list(FAULTS))
    ticket, day = f"R-{dice.randrange(100, 999)}", dice.choice(DAYS)
    return [
        user(question.format(serial=serial, code=code)),
        call("book_repair", serial=serial, code=code),
        observation(ticket=ticket, day=day),
        reply(REPAIR_ANSWER.format(ticket=ticket, day=day)),
    ]


def training_dialogues(
    dice: random.Random, pairs: list[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """Fault codes, terms, dialogues of several turns, and tool calls."""
    for code, machine in pairs:
        for question in dice.sample(FAULT_QUESTIONS, 5):
            yield {"messages": fault_turn(code, machine, question)}
    for questions, _, answer in TERMS.values():
        for question in questions:
            yield {"messages": [user(question), reply(answer)]}
            yield {"messages": [user(f"Hello! {question}"), reply(answer)]}
    topics = list(TERMS.values())
    for _ in range(48):
        questions, _, answer = dice.choice(topics)
        code, machine = dice.choice(pairs)
        turns = [
            [user(dice.choice(questions)), reply(answer)],
            fault_turn(code, machine, dice.choice(FAULT_QUESTIONS)),
        ]
        dice.shuffle(turns)
        yield {"messages": [*turns[0], *turns[1], user(dice.choice(THANKS)), reply(GOODBYE)]}
    for index in range(32):
        question = ORDER_QUESTIONS[index % len(ORDER_QUESTIONS)]
        state = list(ORDER_STATES)[index // 2 % len(ORDER_STATES)]
        yield {"tools": TOOLS, "messages": order_turns(dice, question, state)}
    for index in range(24):
        question = REPAIR_QUESTIONS[index % len(REPAIR_QUESTIONS)]
        yield {"tools": TOOLS, "messages": repair_turns(dice, question)}


def held_out_dialogues(
    dice: random.Random, pairs: list[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """Phrasings, numbers and code-and-machine pairs that training does not have."""
    for code, machine in pairs:
        yield {"messages": fault_turn(code, machine, dice.choice(FAULT_QUESTIONS_HELD_OUT))}
    for _, question, answer in TERMS.values():
        yield {"messages": [user(question), reply(answer)]}
    for code, machine in pairs[:4]:
        _, question, answer = dice.choice(list(TERMS.values()))
        turns = fault_turn(code, machine, dice.choice(FAULT_QUESTIONS_HELD_OUT))
        yield {"messages": [*turns, user(question), reply(answer)]}
    for state in ORDER_STATES:
        yield {"tools": TOOLS, "messages": order_turns(dice, ORDER_QUESTION_HELD_OUT, state)}
    for _ in range(4):
        yield {"tools": TOOLS, "messages": repair_turns(dice, REPAIR_QUESTION_HELD_OUT)}


def main() -> None:
    """Write train.jsonl and heldout.jsonl."""
    dice = random.Random(20)
    pairs = [(code, machine) for code in FAULTS for machine in MACHINES]
    dice.shuffle(pairs)
    splits = {
        "train": list(training_dialogues(dice, pairs[8:])),
        "heldout": list(held_out_dialogues(dice, pairs[:8])),
    }
    dice.shuffle(splits["train"])
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, dialogues in splits.items():
        lines = [json.dumps(dialogue, ensure_ascii=False) + "\n" for dialogue in dialogues]
        (FOLDER / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(lines)} dialogues")


if __name__ == "__main__":
    main()
