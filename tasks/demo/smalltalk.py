"""Greetings, thanks, goodbyes, moods and jokes: what people say to a machine that asks for no fact."""

from __future__ import annotations

Keys = tuple[tuple[str, ...], ...]

HELLO = "Hello! What would you like to know?"
WELCOME = "You are welcome!"
GOODBYE = "Goodbye! See you soon."
HOW_ARE_YOU = "I am ready to help. What would you like to know?"
GOOD = "I am glad to hear that."
SORRY = "I am sorry. Please ask me in other words."
SAD = "I am sorry to hear that."
KIND = "Thank you, that is kind of you."
INSULT = "I am sorry. I am small and still make many mistakes."
GO_ON = "All right. What else would you like to know?"
JOKE = "What has two hands but cannot clap? A clock!"
SECOND_JOKE = "What has many teeth but cannot bite? A comb!"
ASK_ME = "Yes, please ask me something."
BORED = "Then ask me about animals, space or far countries."

# (messages, the reply, the words that a right reply has)
SMALL_TALK: tuple[tuple[tuple[str, ...], str, Keys], ...] = (
    (("Hi!", "Hello!", "Hi", "Hello.", "Hey!", "Hi there!", "Hello there!", "Good morning!", "Good evening!",
      "Good day!", "Hi nanochat!", "Hello nanochat!", "Hey nanochat!", "hey", "Good morning nanochat.", "Yo!", "hiya",
      "Greetings!", "hello hello", "Hi bot.", "Hello, computer.", "morning!", "Good morning :)", "hi :)", "heyy",
      "Hello everyone!", "Hi, nice to meet you.", "Nice to meet you!", "hello?",
      "good evening to you", "Hi, I am new here."), HELLO, (("hello",),)),
    (("Thanks!", "Thank you!", "Thank you very much!", "Many thanks!", "Thanks a lot!", "Thank you, nanochat.",
      "Okay, thanks.", "Thanks, that was good.", "thx", "ty", "Thanks, I see.", "Perfect, thanks.", "Cheers!",
      "Thank you, that helps.", "I thank you.", "thanks :)", "thanks man", "Thank you, you helped me.",
      "That was helpful, thanks.", "thank u", "Very kind, thank you."), WELCOME, (("welcome",),)),
    (("Bye!", "Goodbye!", "Bye bye!", "See you!", "See you later!", "Good night!", "Goodbye, nanochat!",
      "I have to go.", "I must go now.", "cu", "Bye, nanochat.", "That is all.", "I am going home.", "Until tomorrow!",
      "Take care!", "bye :)", "ok bye", "I am off now.", "I have to sleep now.",
      "Have a nice day!"), GOODBYE, (("goodbye",),)),
    (("How are you?", "How are you today?", "How do you do?", "Are you well?", "How is it going?", "Hi, how are you?",
      "Hello, how are you?", "What's up?", "How do you feel?", "Are you okay?", "How was your day?", "How is life?",
      "Is everything fine?", "how r u", "how are you?", "You good?", "How are things?",
      "how do you feel right now?"), HOW_ARE_YOU, (("ready",),)),
    (("That is great!", "Great!", "I like that.", "Nice!", "That is nice.", "Wow!", "What a great answer!", "Cool!",
      "Awesome!", "Very good.", "Good answer.", "I am happy.", "I feel good.", "That is funny.", "haha", "lol",
      "That is right.", "I had a good day.", "I love it."), GOOD, (("glad",),)),
    (("That is wrong.", "This is not right.", "You are wrong.", "No, that is not right.", "I do not understand.",
      "That makes no sense.", "That is a bad answer.", "What?", "Huh?", "This is not what I asked.", "Nonsense!",
      "That is false.", "Are you sure?", "I did not ask that."), SORRY, (("sorry",),)),
    (("I am sad.", "I feel bad.", "I am tired.", "I am ill.", "I had a bad day.", "I am afraid.", "I am lonely.",
      "My cat died.", "I lost my job.", "I have a headache.", "Nobody likes me.", "I am angry.", "I feel so alone.",
      "I am not well.", "Today was terrible.", "I failed my exam."), SAD, (("sorry",),)),
    (("You are great!", "I like you.", "I love you.", "You are clever.", "You are nice.", "You are my friend.",
      "You are very smart.", "Good bot.", "You are funny.", "Well done!", "You know a lot.", "You are amazing.",
      "I think you are sweet.", "you rock", "You are so cute."), KIND, (("kind",),)),
    (("You are dumb.", "You are bad.", "You know nothing.", "I hate you.", "You are useless.", "Bad bot.",
      "You are boring.", "What a silly machine.", "You make mistakes.", "You are so slow.", "you are stupid",
      "You do not know much.", "This bot is bad."), INSULT, (("mistakes",),)),
    (("Okay.", "OK", "Yes.", "No.", "I see.", "Hm.", "Fine.", "Sure.", "All right.", "Aha.", "k", "yes", "no", "maybe",
      "Well.", "Interesting.", "Go ahead.", "Really?"), GO_ON, (("else",),)),
    (("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "A joke, please.", "joke", "Say something funny.",
      "I want to hear a joke."), JOKE, (("clap",),)),
    (("Tell me another joke.", "Another joke, please.", "One more joke.", "Do you know more jokes?"),
     SECOND_JOKE, (("bite",),)),
    (("Can I ask you something?", "May I ask a question?", "Are you there?", "Is anybody there?", "I have a question.",
      "Can we talk?", "Let us talk.", "test", "Are you listening?", "Help!", "I need help.", "Talk to me."),
     ASK_ME, (("ask",),)),
    (("I am bored.", "I have nothing to do.", "What else do you know?", "bored", "What should we talk about?",
      "Tell me something.", "Say something.", "Surprise me.",
      "What can I ask?", "I do not know what to ask.", "Give me an idea."), BORED, (("animals",),)),
)  # fmt: skip
SMALL_TALK_TEST: tuple[tuple[tuple[str, ...], str, Keys], ...] = (
    (("Good afternoon!", "Hey there!", "Hello my friend!"), HELLO, (("hello",),)),
    (("Thank you so much!", "Thanks for your help!", "Great, thank you!"), WELCOME, (("welcome",),)),
    (("Bye for now!", "See you tomorrow!", "Goodbye then!"), GOODBYE, (("goodbye",),)),
    (("How are you doing?", "Hey, how are you today?"), HOW_ARE_YOU, (("ready",),)),
    (("That was a nice answer.", "Super!"), GOOD, (("glad",),)),
    (("No, this is wrong.", "That cannot be right."), SORRY, (("sorry",),)),
    (("I am very sad today.",), SAD, (("sorry",),)),
    (("You are really nice.",), KIND, (("kind",),)),
    (("You are a bad bot.",), INSULT, (("mistakes",),)),
    (("Please tell me a joke.", "I would like a joke."), JOKE, (("clap",),)),
    (("Can I ask you a question?",), ASK_ME, (("ask",),)),
)  # fmt: skip
