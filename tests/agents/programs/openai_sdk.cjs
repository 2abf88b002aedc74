// The OpenAI SDK for Node: Chat Completions, streamed, with a calculator for up to four calls.
const OpenAI = require("openai");
const { calculate, description, parameters, printReward } = require("./calculator.cjs");

async function main() {
  const task = JSON.parse(process.argv[2]);
  const client = new OpenAI({ maxRetries: 0 });
  const tools = [{ type: "function", function: { name: "calc", description, parameters } }];
  const messages = [...task.messages];
  for (let turn = 0; turn < 4; turn++) {
    const stream = client.chat.completions.stream({ model: "default", messages, tools });
    const { message } = (await stream.finalChatCompletion()).choices[0];
    messages.push(message);
    if (!message.tool_calls?.length) return printReward(message.content ?? "", task.answer);
    for (const call of message.tool_calls) {
      const content = calculate(JSON.parse(call.function.arguments));
      messages.push({ role: "tool", tool_call_id: call.id, content });
    }
  }
  printReward("", task.answer);
}

main();
