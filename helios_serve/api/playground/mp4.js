// Reads from an init segment what MediaSource must be told. Knows boxes and codec strings; knows nothing of playing.

const CONTAINERS = ["moov", "trak", "mdia", "minf", "stbl"];
const hex = (value) => value.toString(16).padStart(2, "0");
const two = (value) => String(value).padStart(2, "0");

/** Whether these bytes begin with `ftyp`, that is, with an init segment. */
export const startsWithInit = (bytes) => bytes.byteLength >= 8 && typeAt(view(bytes), 4) === "ftyp";

/** The MIME type with the codec string of the first video track, null when there is none that we know. */
export function mimeOf(bytes) {
  const data = view(bytes);
  const entry = sampleEntry(data, 0, data.byteLength);
  const codec = entry && codecOf(data, entry);
  return codec ? `video/mp4; codecs="${codec}"` : null;
}

function view(bytes) {
  return bytes instanceof ArrayBuffer ? new DataView(bytes) : new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

function* boxes(data, start, end) {
  for (let at = start; at + 8 <= end; ) {
    const size = data.getUint32(at);
    if (size < 8 || at + size > end) return;
    yield { type: typeAt(data, at + 4), start: at + 8, end: at + size };
    at += size;
  }
}

function sampleEntry(data, start, end) {
  for (const box of boxes(data, start, end)) {
    if (box.type === "stsd") return boxes(data, box.start + 8, box.end).next().value; // version, flags, entry count
    if (CONTAINERS.includes(box.type)) {
      const found = sampleEntry(data, box.start, box.end);
      if (found) return found;
    }
  }
  return null;
}

function codecOf(data, entry) {
  for (const box of boxes(data, entry.start + 78, entry.end)) { // 78 bytes of VisualSampleEntry precede its boxes
    const at = (offset) => data.getUint8(box.start + offset);
    if (box.type === "avcC") return `${entry.type}.${hex(at(1))}${hex(at(2))}${hex(at(3))}`;
    if (box.type === "vpcC") return `vp09.${two(at(4))}.${two(at(5))}.${two(at(6) >> 4)}`;
    if (box.type === "av1C") {
      const depth = at(2) & 0x40 ? (at(2) & 0x20 ? 12 : 10) : 8;
      return `av01.${at(1) >> 5}.${two(at(1) & 31)}${at(2) & 0x80 ? "H" : "M"}.${two(depth)}`;
    }
  }
  return null;
}

const typeAt = (data, at) => String.fromCharCode(...[0, 1, 2, 3].map((i) => data.getUint8(at + i)));
