// The calculator of nanochat/generate/calculator.py in JavaScript: the same small language, the same answers.
//
// Whole numbers are BigInt, as long as Python's; all others are doubles, which both languages have. What differs between
// them is written out here: division of long numbers, remainders of negative ones, powers, and how a float is written.

const MAX_EXPRESSION_CHARS = 500;
const MAX_INT_BITS = 2048;

const NUMBER = /(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?/y;
const OTHERS = /[ \t]+|"[^"\\\r\n]*"|'[^'\\\r\n]*'|\.(?:count|join|strip|lower)\b|len\b|\*\*|\/\/|[-+*/%()]/y;
const SPACE = "[\\t-\\r\\x1c-\\x20\\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000]";
const STRIP = new RegExp(`^${SPACE}+|${SPACE}+$`, "g"); // what Python's strip() removes; trim() differs

class Refused extends Error {}

function refuse(why) {
  throw new Refused(why);
}

// Returns the result as text, or null if the expression is not one the tool knows.
export function useCalculator(expression) {
  try {
    return write(new Parser(pythonTokens(fence(expression))).parse());
  } catch (error) {
    if (error instanceof Refused) return null;
    throw error;
  }
}

// --- text to tokens ------------------------------------------------------------------------------------------------

// The expression without thousands commas; refused if it holds anything but the known tokens.
function fence(expression) {
  const text = expression.replace(STRIP, "");
  if (!text || [...text].length > MAX_EXPRESSION_CHARS) refuse("empty or too long");
  if (text.includes("\0") || /[\ud800-\udfff]/u.test(text)) refuse("no text of a program");
  let source = "";
  for (let at = 0; at < text.length; ) {
    NUMBER.lastIndex = OTHERS.lastIndex = at;
    const number = NUMBER.exec(text);
    const [piece] = number ?? OTHERS.exec(text) ?? refuse("not a token");
    source += number ? piece.replaceAll(",", "") : piece;
    at += piece.length;
  }
  return source;
}

// Reads the fenced text as Python does: '""' and '"a"' beside each other open a string in three quotes.
function pythonTokens(source) {
  const tokens = [];
  for (let at = 0; at < source.length; ) {
    NUMBER.lastIndex = OTHERS.lastIndex = at;
    const quote = source[at];
    let text;
    if (quote === '"' || quote === "'") {
      const mark = source.startsWith(quote.repeat(3), at) ? quote.repeat(3) : quote;
      const end = source.indexOf(mark, at + mark.length);
      if (end < 0) refuse("a string without an end");
      tokens.push({ kind: "string", value: source.slice(at + mark.length, end) });
      at = end + mark.length;
      continue;
    }
    if (NUMBER.test(source)) {
      text = source.slice(at, NUMBER.lastIndex);
      tokens.push({ kind: "number", value: constant(text) });
    } else {
      [text] = OTHERS.exec(source);
      if (text.trim()) tokens.push({ kind: text });
    }
    at += text.length;
  }
  return tokens;
}

function constant(text) {
  if (/[.eE]/.test(text)) return bounded(Number(text));
  if (/^0+[1-9]/.test(text)) refuse("a whole number with leading zeros");
  return BigInt(text);
}

// --- tokens to a value: Python's grammar, as far as it is known here ---------------------------------------------------

const MAX_PARENTHESES = 200; // Python's own limit

class Parser {
  constructor(tokens) {
    this.tokens = tokens;
    this.at = 0;
    this.depth = 0;
  }

  get next() {
    return this.tokens[this.at]?.kind;
  }

  take(...kinds) {
    return kinds.includes(this.next) ? this.tokens[this.at++] : null;
  }

  parse() {
    const node = this.sum();
    const value = node?.joined ?? number(node);
    if (this.at < this.tokens.length) refuse("something is left over");
    return value;
  }

  // A node is a value: BigInt, number, string, {joined} for the text of a join, which may be the answer, or {call} and
  // {bare} for functions that wait for their parentheses, with an argument and without.
  sum() {
    let left = this.product();
    for (let sign; (sign = this.take("+", "-")); ) left = binary(sign.kind, left, this.product());
    return left;
  }

  product() {
    let left = this.factor();
    for (let sign; (sign = this.take("*", "/", "//", "%")); ) left = binary(sign.kind, left, this.factor());
    return left;
  }

  factor() {
    const sign = this.take("+", "-");
    if (!sign) return this.power();
    const value = number(this.factor());
    return sign.kind === "-" ? -value : value;
  }

  power() {
    const base = this.primary();
    return this.take("**") ? power(number(base), number(this.factor())) : base;
  }

  primary() {
    let node = this.atom();
    for (let token; (token = this.take(".count", ".join", ".strip", ".lower", "(")); ) {
      if (token.kind === ".count") node = { call: countIn(string(node)) };
      else if (token.kind === ".join") node = { call: joinBy(string(node)) };
      else if (token.kind !== "(") {
        const text = string(node);
        node = { bare: () => (token.kind === ".strip" ? text.replace(STRIP, "") : text.toLowerCase()) };
      } else if (node?.bare) node = this.take(")") ? node.bare() : refuse("an argument");
      else {
        if (typeof node?.call !== "function") refuse("not a function");
        node = node.call(string(this.group()));
      }
    }
    return node;
  }

  group() {
    this.depth += 1;
    if (this.depth > MAX_PARENTHESES) refuse("too many parentheses");
    const node = this.sum();
    if (!this.take(")")) refuse("a parenthesis stays open");
    this.depth -= 1;
    return node;
  }

  atom() {
    const token = this.take("number", "string", "len", "(") ?? refuse("an operand is missing");
    if (token.kind === "number") return token.value;
    if (token.kind === "len") return { call: (text) => BigInt([...text].length) };
    if (token.kind === "(") return this.group();
    let text = token.value;
    for (let more; (more = this.take("string")); ) text += more.value; // neighbours are one string
    return text;
  }
}

function number(node) {
  return typeof node === "bigint" || typeof node === "number" ? node : refuse("not a number");
}

function string(node) {
  return typeof node === "string" ? node : (node?.joined ?? refuse("not a string"));
}

function joinBy(mark) {
  return (text) => {
    const joined = [...text].join(mark);
    return [...joined].length > MAX_EXPRESSION_CHARS ? refuse("too long") : { joined };
  };
}

function countIn(text) {
  return (part) => BigInt(part ? text.split(part).length - 1 : [...text].length + 1);
}

// --- arithmetic --------------------------------------------------------------------------------------------------------

function bits(value) {
  const hex = (value < 0n ? -value : value).toString(16);
  return value === 0n ? 0 : 4 * hex.length - Math.clz32(parseInt(hex[0], 16)) + 28;
}

function bounded(value) {
  if (typeof value === "bigint" ? bits(value) > MAX_INT_BITS : !Number.isFinite(value)) refuse("too large");
  return value;
}

function float(value) {
  return bounded(Number(value));
}

function binary(sign, leftNode, rightNode) {
  let [left, right] = [number(leftNode), number(rightNode)];
  const whole = typeof left === "bigint" && typeof right === "bigint";
  if (!whole) [left, right] = [float(left), float(right)];
  if (sign === "+") return bounded(left + right);
  if (sign === "-") return bounded(left - right);
  if (sign === "*") return bounded(left * right);
  if (!right) refuse("division by zero");
  if (sign === "/") return bounded(whole ? quotient(left, right) : left / right);
  // Python's remainder has the sign of the divisor, and // rounds down: JavaScript's follow the dividend.
  let rest = left % right;
  if (whole) {
    const wrong = rest !== 0n && rest < 0n !== right < 0n;
    return sign === "%" ? (wrong ? rest + right : rest) : left / right - (wrong ? 1n : 0n);
  }
  let times = (left - rest) / right;
  if (rest === 0) rest = right < 0 ? -0 : 0;
  else if (rest < 0 !== right < 0) {
    rest += right;
    times -= 1;
  }
  if (sign === "%") return bounded(rest);
  if (times === 0) return left / right < 0 || Object.is(left / right, -0) ? -0 : 0;
  const floor = Math.floor(times);
  return bounded(times - floor > 0.5 ? floor + 1 : floor);
}

// 2 to the power of a whole number from -1074 to 1023, exact.
function powerOfTwo(exponent) {
  if (exponent >= 0) return Number(1n << BigInt(exponent));
  if (exponent >= -1022) return 1 / Number(1n << BigInt(-exponent));
  return Number.MIN_VALUE * Number(1n << BigInt(exponent + 1074));
}

// The double that is nearest to above / below, the even one of two (like Python's division of whole numbers).
function quotient(above, below) {
  const negative = above < 0n !== below < 0n;
  const [a, b] = [above < 0n ? -above : above, below < 0n ? -below : below];
  if (a === 0n) return negative ? -0 : 0;
  let exponent = Math.max(bits(a) - bits(b) - 53, -1074); // of the last bit that a double keeps
  for (;;) {
    const [n, d] = exponent < 0 ? [a << BigInt(-exponent), b] : [a, b << BigInt(exponent)];
    let mantissa = n / d;
    if (mantissa >> 53n) {
      exponent += 1;
      continue;
    }
    const twice = 2n * (n - mantissa * d);
    if (twice > d || (twice === d && mantissa & 1n)) mantissa += 1n;
    if (exponent > 971) refuse("too large");
    const value = Number(mantissa) * powerOfTwo(exponent);
    return negative ? -value : value;
  }
}

function power(base, exponent) {
  if (typeof base === "bigint" && typeof exponent === "bigint") {
    const size = base < 0n ? -base : base;
    const positive = exponent < 0n ? -exponent : exponent;
    // |base| >= 2 ** (bits - 1): refused before it is computed when the result would be too long.
    if (size > 1n && positive * BigInt(Math.max(1, bits(base) - 1)) > BigInt(MAX_INT_BITS)) refuse("too large");
    if (exponent >= 0n) return size > 1n ? bounded(base ** exponent) : base ** (exponent & 1n || exponent && 2n);
  }
  return bounded(floatPower(float(base), float(exponent)));
}

// Doubles as a fraction: value = mantissa · 2 ** exponent.
function fraction(value) {
  const view = new DataView(new ArrayBuffer(8));
  view.setFloat64(0, value);
  const raw = view.getBigUint64(0);
  const stored = Number((raw >> 52n) & 0x7ffn);
  return [(raw & 0xfffffffffffffn) | (stored ? 1n << 52n : 0n), Math.max(stored, 1) - 1075];
}

// Math.pow of a browser may be wrong in the last digit; here the result is rounded once, from 256 bits.
function floatPower(base, exponent) {
  if (exponent === 0 || base === 1) return 1;
  if (base === 0 && exponent < 0) refuse("division by zero");
  const odd = Number.isInteger(exponent) && Math.abs(exponent) < 2 ** 53 && exponent % 2 !== 0;
  if (base === 0) return odd ? base : 0;
  if (base < 0 && !Number.isInteger(exponent)) refuse("not a real number");
  const sign = base < 0 && odd ? -1 : 1;
  const size = Math.abs(base);
  if (size === 1) return sign;
  const rough = exponent * Math.log2(size);
  if (rough > 1025) refuse("too large");
  if (rough < -1080) return sign * 0;
  const [m, e] = fraction(size);
  if (Number.isInteger(exponent) && exponent > 0 && exponent <= 64) {
    // The exact power: it may lie in the middle between two doubles, which no approximation decides.
    const [n, shift] = [m ** BigInt(exponent), BigInt(e * exponent)];
    return sign * (shift < 0n ? quotient(n, 1n << -shift) : quotient(n << shift, 1n));
  }
  return sign * exponential(exponent, m, e);
}

const PLACES = 256n; // fixed point: binary places
const ONE = 1n << PLACES;

// ln(n / d) for n / d in [1/2, 2], as 2 · artanh((n - d) / (n + d)).
function logarithm(n, d) {
  const z = ((n - d) << PLACES) / (n + d);
  const square = (z * z) >> PLACES;
  let sum = 0n;
  for (let term = z, k = 1n; term && term !== -1n; term = (term * square) >> PLACES, k += 2n) sum += term / k;
  return 2n * sum;
}

// (mantissa · 2 ** exponent) ** power, rounded to a double.
function exponential(power, mantissa, exponent) {
  const ln2 = logarithm(2n, 1n);
  const places = BigInt(bits(mantissa));
  const ln = logarithm(mantissa, 1n << places) + (BigInt(exponent) + places) * ln2;
  const [m, e] = fraction(Math.abs(power));
  const product = e < 0 ? (ln * m) >> BigInt(-e) : (ln * m) << BigInt(e);
  const y = power < 0 ? -product : product;
  let twos = y / ln2;
  if (y < 0n) twos -= 1n;
  const rest = y - twos * ln2; // in [0, ln 2]
  let sum = 0n;
  for (let term = ONE, k = 1n; term; term = ((term * rest) >> PLACES) / k, k += 1n) sum += term;
  return twos < 0n ? quotient(sum, ONE << -twos) : quotient(sum << twos, ONE);
}

// --- a value as text -----------------------------------------------------------------------------------------------------

const DIGITS = 12; // of a float: what lies behind them is rounding

function write(value) {
  if (typeof value === "string") return value;
  if (typeof value === "bigint") return value.toString();
  const rounded = round(value);
  return Number.isInteger(rounded) && Math.abs(rounded) < 2 ** 53 ? BigInt(rounded).toString() : asPython(rounded);
}

// To DIGITS digits; of two that are equally near the even one, like Python. toPrecision takes the larger.
function round(value) {
  const [, sign, first, rest, exponent] = /^(-?)(\d)\.(\d+)e([+-]\d+)$/.exec(value.toExponential(100));
  const [kept, beyond] = [BigInt(first + rest.slice(0, DIGITS - 1)), rest.slice(DIGITS - 1)];
  const half = "5".padEnd(beyond.length, "0");
  const up = beyond > half || (beyond === half && kept & 1n) ? 1n : 0n;
  return Number(`${sign}${kept + up}e${Number(exponent) - DIGITS + 1}`);
}

// As Python's str() has it: JavaScript turns to exponents elsewhere.
function asPython(value) {
  const [, sign, first, rest = "", exponent] = /^(-?)(\d)(?:\.(\d+))?e([+-]\d+)$/.exec(value.toExponential());
  const digits = first + rest;
  const point = Number(exponent) + 1; // digits before the point
  if (point <= -4 || point > 16) {
    const size = String(Math.abs(point - 1)).padStart(2, "0");
    return `${sign}${first}${rest && `.${rest}`}e${point < 1 ? "-" : "+"}${size}`;
  }
  if (point <= 0) return `${sign}0.${"0".repeat(-point)}${digits}`;
  if (point >= digits.length) return `${sign}${digits.padEnd(point, "0")}.0`;
  return `${sign}${digits.slice(0, point)}.${digits.slice(point)}`;
}
